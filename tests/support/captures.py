"""Programs that capture a graph."""

# a loss and its gradient, rescaled, from one kernel; losses of rows, whose gradient has a kernel of its own
CAPTURED_FIRST = """
import torch
from auxkernels import aux_cross_entropy
torch.manual_seed(0)
base, aux = torch.randn(4, 5000, device="cuda"), torch.randn(4, 5000, device="cuda", requires_grad=True)
target = torch.tensor([0, 99, -100, 5], device="cuda")
half, upstream = torch.full((), 0.5, device="cuda"), torch.rand(4, device="cuda")
def results():
    loss = aux_cross_entropy(base, aux, target, backend="native")
    losses = aux_cross_entropy(base, aux, target, reduction="none", backend="native")
    grads = torch.autograd.grad(loss, aux, half) + torch.autograd.grad(losses, aux, upstream)
    return [loss.detach(), losses.detach(), *grads]
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    got = results()
graph.replay()
print(all(map(torch.equal, got, results())))
"""
