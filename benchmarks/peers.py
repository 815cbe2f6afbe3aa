"""``python -m benchmarks.peers``: what other packages' losses of large vocabularies do, as docs/performance.md has it.

Every cell was read in the file that the table names, of the version that it names. ``--write`` writes it;
``--check`` asks the package index for newer versions and lists them: its exit status is 1 where there is one, because
a claim about a peer is one about a version.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from dataclasses import dataclass

from packaging.version import Version

from benchmarks.files import ROOT, with_section, write_atomically

PAGE = ROOT / "docs/performance.md"
INDEX = "https://pypi.org/pypi/{}/json"
YES, NO = "yes", "no"


@dataclass(frozen=True)
class Peer:
    """A package's cross-entropy or log-probability of a large vocabulary.

    distribution, version   as on the package index
    read                    the day
    files                   in which the rest was read
    sums_two                whether two sources of logits are added inside
    frozen_is_free          whether a frozen side costs no gradient
    no_logits               whether no [N, V] tensor of logits is stored
    cpu, sharded            whether it runs on CPU, and with the vocabulary over several processes
    statistics              that come with the loss
    """

    distribution: str
    version: str
    read: str
    files: tuple[str, ...]
    sums_two: str
    frozen_is_free: str
    no_logits: str
    cpu: str
    sharded: str
    statistics: str


PEERS = (
    Peer(
        "torch",
        "2.15.0",
        "2026-12-01",
        (
            "torch/nn/functional.py",
            "torch/nn/modules/linear_cross_entropy.py",
            "torch/distributed/tensor/parallel/loss.py",
        ),
        NO,
        YES,
        "`linear_cross_entropy`, in chunks of rows where `options` ask for it, unless labels are smoothed",
        YES,
        "`loss_parallel`, of stored logits",
        "none",
    ),
    Peer(
        "trl",
        "1.16.0",
        "2026-11-30",
        ("trl/kernels/chunked_divergence.py", "trl/kernels/chunked_logprob.py"),
        "two heads of different widths side by side, for divergences of one from the other",
        YES,
        YES,
        "tiles in PyTorch",
        NO,
        "log-probability, entropy, sum of squares, mean logit, is_top1",
    ),
    Peer(
        "liger-kernel",
        "0.8.5",
        "2026-11-30",
        (
            "liger_kernel/ops/fused_linear_scaled_cross_entropy.py",
            "liger_kernel/ops/fused_ce_tvd.py",
            "liger_kernel/ops/vocab_parallel_cross_entropy.py",
        ),
        "two stored logits side by side, for cross-entropy and total variation",
        YES,
        YES,
        "chunks in PyTorch",
        YES,
        "entropy, log-probabilities of chosen tokens",
    ),
    Peer(
        "quack-kernels",
        "0.6.5",
        "2026-11-30",
        ("quack/linear_cross_entropy.py",),
        NO,
        YES,
        YES,
        NO,
        NO,
        "none",
    ),
    Peer(
        "cut-cross-entropy",
        "25.1.1",
        "2026-11-30",
        ("cut_cross_entropy/cce.py", "cut_cross_entropy/cce_backward.py", "cut_cross_entropy/torch_compile.py"),
        NO,
        YES,
        YES,
        "by torch.compile, with stored logits",
        NO,
        "none",
    ),
    Peer(
        "verl",
        "0.9.1",
        "2026-11-30",
        ("verl/utils/kernel/linear_cross_entropy.py", "verl/utils/kernel/kernels.py"),
        NO,
        "both gradients are computed",
        YES,
        NO,
        YES,
        "log-probability, entropy",
    ),
)


def section() -> str:
    """What the page says."""
    header = [
        "package",
        "adds two sources",
        "frozen side is free",
        "no [N, V] logits",
        "CPU",
        "vocabulary over processes",
        "statistics",
    ]
    rows = [
        [
            f"{peer.distribution} {peer.version}",
            peer.sums_two,
            peer.frozen_is_free,
            peer.no_logits,
            peer.cpu,
            peer.sharded,
            peer.statistics,
        ]
        for peer in PEERS
    ]
    rows.append(
        [
            "auxkernels",
            "any number, logits and heads of any widths",
            YES,
            YES,
            "C++",
            YES,
            "log-probabilities, entropies, divergence from the base, largest tokens, of one reading",
        ]
    )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])
    files = "\n".join(
        f"* {peer.distribution} ({peer.read}): {', '.join(f'`{file}`' for file in peer.files)}" for peer in PEERS
    )
    return f"""What other public packages' losses of large vocabularies do, read in their sources. Written by
`python -m benchmarks.peers --write`; a weekly job lists the peers that have been released anew since
(`python -m benchmarks.peers --check`). How fast they are beside this package, where they run on the same machine, is
[above](#speed).

{table}

It was read, on the days that stand there, in

{files}"""


def page() -> str:
    """docs/performance.md, with what it says of peers written anew."""
    return with_section(PAGE.read_text(), "peers", "python -m benchmarks.peers --write", section())


def newest(distribution: str) -> Version:
    """The newest release on the package index."""
    with urllib.request.urlopen(INDEX.format(distribution), timeout=60) as answer:
        return Version(json.load(answer)["info"]["version"])


def outdated() -> list[str]:
    """A line for each peer that has been released anew."""
    found = []
    for peer in PEERS:
        released = newest(peer.distribution)
        if released > Version(peer.version):
            found.append(f"{peer.distribution} {released} is out; the page has read {peer.version}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write it into docs/performance.md")
    parser.add_argument("--check", action="store_true", help="list peers with a newer version than was read")
    arguments = parser.parse_args(argv)
    if arguments.write:
        text = page()
        write_atomically(PAGE, lambda path: path.write_text(text))
    if arguments.check:
        lines = outdated()
        print("\n".join(lines) or "no peer has a newer version than was read")
        return 1 if lines else 0
    if not arguments.write:
        print(section())
    return 0


if __name__ == "__main__":
    sys.exit(main())
