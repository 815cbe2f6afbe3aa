"""Whether an installed wheel works: run by the Python that it was installed for, with nothing but torch beside it."""

import sys
from pathlib import Path

import torch

import auxkernels


def openmp_runtimes() -> set[str]:
    """Files of OpenMP runtimes that are mapped into this process; of none where the system does not tell (macOS)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return set()
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if len(line.split()) > 5}
    return {path for path in paths if any(name in Path(path).name for name in ("libgomp", "libomp", "libiomp"))}


def main() -> None:
    print(auxkernels.show_config())
    base, aux = torch.randn(64, 5003), torch.randn(64, 5003, requires_grad=True)
    target = torch.randint(5003, (64,))
    losses = [auxkernels.aux_cross_entropy(base, aux, target, backend=name) for name in ("native", "reference")]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    losses[0].backward()
    mixed = auxkernels.soft_embedding(torch.randn(64, 128), torch.randn(128, 96), backend="native")
    assert mixed.shape == (64, 96) and aux.grad.isfinite().all()
    runtimes = openmp_runtimes()
    if len(runtimes) > 1:
        sys.exit(f"one OpenMP runtime must be mapped, got {', '.join(sorted(runtimes))}")
    print("openmp    ", *runtimes)


if __name__ == "__main__":
    main()
