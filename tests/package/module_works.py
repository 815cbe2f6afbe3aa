"""Whether a compiled CPU module works by itself, with every instruction set of this processor: no torch is needed.

    python module_works.py auxkernels/native/_cpu.*.so

Run by any Python that the module was built for, and by emulators of other processors. Sums in Python, in float64, are
the oracle; the bound is one rounding of the compute dtype for each of the classes.
"""

import ctypes
import importlib.util
import math
import platform
import sys
from pathlib import Path

NUM_ROWS, V = 5, 4099  # more than one block of columns, and a tail
DTYPES = {"float32": (ctypes.c_float, 0, 2.0**-24), "float64": (ctypes.c_double, 3, 2.0**-53)}
NO_SOURCE, NO_NUMBERS = (0,) * 8, (1.0, 0.0)


def load(path):
    spec = importlib.util.spec_from_file_location("_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits(factor):
    """Of [-6, 6), all different in a row, in numbers that every dtype holds and whose sums are exact."""
    return [((row * 131 + column * factor) % V - V // 2) * 3 / 1024 for row in range(NUM_ROWS) for column in range(V)]


def row_of(values, row):
    return values[row * V : (row + 1) * V]


def source(values, code):
    return (ctypes.addressof(values), code, V, NUM_ROWS, 0, V, 0, 0)


def check_loss(module, name):
    """The mean cross-entropy of a sum, and its gradient."""
    number, code, rounding = DTYPES[name]
    count = NUM_ROWS * V
    base, aux = ((number * count)(*logits(factor)) for factor in (17, 29))
    target, grad, value = (ctypes.c_int64 * NUM_ROWS)(*range(NUM_ROWS)), (number * count)(), number()
    rows = (NUM_ROWS, V, ctypes.addressof(target), False, -100, 0, 0, 2, name == "float64", 0)
    sources = source(base, code), NO_NUMBERS, source(aux, code), NO_NUMBERS
    fields = len(module.field_names())
    outputs = [0] * (fields + 6)
    outputs[fields + 1], outputs[fields + 5] = ctypes.addressof(grad), code
    module.loss(rows, *sources, outputs, ctypes.addressof(value), False, 1.0, 0.0, 0.0, True)
    expected = 0.0
    for row in range(NUM_ROWS):
        sums = [a + b for a, b in zip(row_of(base, row), row_of(aux, row), strict=True)]
        lse = math.log(math.fsum(map(math.exp, sums)))
        expected += (lse - sums[target[row]]) / NUM_ROWS
        for column, (found, s) in enumerate(zip(row_of(grad, row), sums, strict=True)):
            probability, one = math.exp(s - lse), float(column == target[row])
            error = abs(found * NUM_ROWS - (probability - one))
            assert error <= V * rounding * (probability + one), f"gradient [{row}, {column}]: {found}"
    assert abs(value.value - expected) <= V * rounding * expected, f"{value.value} for {expected}"


def check_sample(module):
    """The one token that top_k=1 leaves is the argmax."""
    values = (ctypes.c_float * (NUM_ROWS * V))(*logits(17))
    tokens = (ctypes.c_int64 * NUM_ROWS)()
    parameters = {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "plausibility": 0.0, "seed": 7}
    numbers = [parameters.get(name, 0) for name in module.sample_parameter_names()]
    fields = [ctypes.addressof(tokens) if name == "token" else 0 for name in module.sample_field_names()]
    rows = (NUM_ROWS, V, 1, 0, False, False, 2, False)
    places = [(0, 0)] * len(numbers)
    module.sample(
        rows, [source(values, 0)], [NO_NUMBERS], places, [float(n) for n in numbers], [int(n) for n in numbers], fields
    )
    for row, token in enumerate(tokens):
        assert values[row * V + token] == max(row_of(values, row)), f"row {row}: {token}"


def check_add(module):
    a, b = ((ctypes.c_float * V)(*logits(factor)[:V]) for factor in (17, 29))
    total = (ctypes.c_float * V)()
    module.add((ctypes.addressof(total), 0), (ctypes.addressof(a), 0), (ctypes.addressof(b), 0), V, 2)
    assert list(total) == [x + y for x, y in zip(a, b, strict=True)]


def main():
    module = load(sys.argv[1])
    for name in module.instruction_sets():
        module.set_instruction_set(name)
        assert module.instruction_set() == name
        check_add(module)
        check_sample(module)
        for dtype in DTYPES:
            check_loss(module, dtype)
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    size = Path(sys.argv[1]).stat().st_size
    print(f"Python {platform.python_version()}, {'with' if gil else 'without'} the GIL, {size} bytes")
    print("works with", *module.instruction_sets())


if __name__ == "__main__":
    main()
