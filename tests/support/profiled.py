"""What a call asks torch for, as its profiler counts it."""

import torch


def products(function) -> list[tuple[int, int, int]]:
    """(m, k, n) of every matrix product that torch is asked for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    found = []
    for event in profile.events():
        first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}.get(event.name)
        parent = None if event.cpu_parent is None else event.cpu_parent.name
        if first is not None and parent not in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (m, k), (_, n) = event.input_shapes[first : first + 2]
            found.append((m, k, n))
    return found
