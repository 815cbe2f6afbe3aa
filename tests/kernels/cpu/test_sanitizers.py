"""The CPU module built with address and undefined-behaviour sanitizers, under the tests that reach furthest.

Python itself is not instrumented, so the sanitizers' runtime is preloaded and its leak check is off.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[3]
SANITIZERS = "address,undefined"
# hostile targets and canaries, every width and view, every coefficient, non-finite rows, each instruction set
CHOSEN = [
    "operators/test_cache.py::test_the_memory_of_a_dead_tensor_is_that_of_the_next",
    "operators/test_cache.py::test_a_block_serves_any_shape_and_dtype_that_fills_most_of_it",
    "operators/test_cache.py::test_no_more_waits_than_is_allowed_and_the_oldest_is_given_back_first",
    "operators/test_cache.py::test_threads_that_take_and_free_never_share_a_block",
    "operators/test_cache.py::test_nothing_depends_on_what_a_block_held_before",
    "sampling/test_equal_tokens.py",
    "sampling/test_registration.py::test_raw_operators_survive_every_empty_shape",
    "soft_embedding/test_native_plain.py",
    "soft_embedding/test_soft_embedding.py::test_scores_are_read_in_place_whatever_their_strides",
    "soft_embedding/test_process.py::test_every_instruction_set_finds_ties_nan_and_rows_without_a_label",
    "soft_embedding/test_process.py::test_a_nan_in_any_part_of_a_long_row_is_found",
    "cross_entropy/test_safety.py::test_a_hostile_target_is_an_index_error_with_row_and_value",
    "cross_entropy/test_safety.py::test_gradients_stay_inside_their_buffers",
    "cross_entropy/test_safety.py::test_every_output_element_is_written",
    "cross_entropy/test_safety.py::test_no_rows_leave_nothing_unwritten",
    "cross_entropy/test_cross_entropy.py::test_loss_and_gradients_at_every_width",
    "cross_entropy/test_cross_entropy.py::test_loss_and_gradients_at_every_number_of_rows",
    "cross_entropy/test_cross_entropy.py::test_a_view_is_read_where_it_lies",
    "cross_entropy/test_cross_entropy.py::test_an_expanded_source_is_read_with_stride_zero",
    "cross_entropy/test_cross_entropy.py::test_columns_past_vocab_size_are_never_read_and_get_zero_gradient",
    "cross_entropy/test_cross_entropy.py::test_options_together_match_the_oracle",
    "cross_entropy/test_backward_form.py::test_all_coefficients_together",
    "cross_entropy/test_backward_form.py::test_only_the_needed_gradients_come_back_and_they_are_the_same",
    "cross_entropy/test_nonfinite.py::test_a_row_has_the_pattern_of_float64_torch_and_its_neighbours_are_untouched",
    "cross_entropy/test_statistics.py::test_the_first_nan_wins_the_argmax",
    "kernels/cpu/test_instruction_sets.py::test_every_option_matches_the_oracle",
    "kernels/cpu/test_instruction_sets.py::test_halves_are_rounded_to_nearest_even_through_the_whole_range",
    "cross_entropy/test_properties.py::test_a_long_row_alone_has_the_bits_it_has_among_others",
    "cross_entropy/test_many.py::test_any_vocabulary",
    "cross_entropy/test_many.py::test_nothing_is_written_before_all_targets_are_checked",
    "cross_entropy/test_many.py::test_rows_are_shared_out_over_threads_without_a_trace",
    "cross_entropy/test_many.py::test_wide_tails_and_views_have_the_gradients_of_single_calls",
]


def build(root: Path) -> None:
    """A copy of the package and its tests, with a CPU module built with sanitizers."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, root)
    for name in ("csrc", "auxkernels", "tests"):
        shutil.copytree(
            CHECKOUT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
        )
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = os.environ | {"AUXKERNELS_BUILD": "cpu", "AUXKERNELS_SANITIZE": SANITIZERS}
    built = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]


def run(root: Path, preload: str, arguments: list[str], timeout: float = 1200):
    environment = os.environ | {
        "LD_PRELOAD": preload,
        "PYTHONPATH": str(root),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "2",
    }
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)


OVERRUN = """
import ctypes, torch
from auxkernels import logit_stats, native
print(native.cpu().__file__)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
room = (ctypes.c_char * 96).from_address(libc.malloc(ctypes.c_size_t(88)))  # said to be longer than it is
logit_stats(torch.frombuffer(room, dtype=torch.float64).view(3, 4), None, backend="native")
print("survived")
"""


# memory that the sanitizer's allocator knows nothing of: a block that waits, and what is behind a tensor's end
BLOCKS = """
import sys, torch
from auxkernels import memory, native
memory.LARGE = 4096
one = memory.empty(torch.empty(0), (4096,)).fill_(1)
place, length = (one.data_ptr(), 0), 4096
if sys.argv[1] == "waiting":
    del one
elif sys.argv[1] == "end":
    length += 1
elif sys.argv[1] == "used again":
    del one
    one = memory.empty(torch.empty(0), (4096,)).fill_(1)
native.cpu().add(place, place, place, length, 1)
print("survived")
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_sanitizers_find_nothing_in_the_tests_and_do_find_an_overrun(tmp_path, preload):
    """One test, because the module is built for it; the overruns are the negative controls."""
    build(tmp_path)
    control = run(tmp_path, preload, ["-c", OVERRUN])
    assert str(tmp_path) in control.stdout, control.stderr[-2000:]
    assert "survived" not in control.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in control.stderr, control.stderr[-2000:]
    for place, is_found in (("waiting", True), ("end", True), ("used again", False), ("used", False)):
        control = run(tmp_path, preload, ["-c", BLOCKS, place])
        assert ("survived" in control.stdout) != is_found, (place, control.stderr[-2000:])
        assert ("AddressSanitizer: use-after-poison" in control.stderr) == is_found, (place, control.stderr[-2000:])
    chosen = [f"tests/{test}" for test in CHOSEN]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not reference and not cuda"]
    done = run(tmp_path, preload, ["-m", "pytest", *options, *chosen])
    report = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, report
    assert "AddressSanitizer" not in report and "runtime error" not in report, report
    assert " passed" in done.stdout, report
