"""benchmarks.scaling: slopes and marks of invented rows, one dimension to a ladder, rows and page of a real one."""

import math

import pytest
import torch

from benchmarks.gpu import results_page
from benchmarks.scaling import __main__ as command
from benchmarks.scaling import slopes
from benchmarks.timing import harness, machine_info, report

SIZES = (64, 128, 256, 512)
MACHINE = {"device": "Imaginary CPU", "device_slug": "imaginary", "native_isa": "avx512", "torch": "2.13.0"}
MACHINE |= {"commit": "0123456789ab", "is_dirty": False, "date": "2026-12-01T00:00:00+00:00"}


def invented(time_us, spread=0.01, threads=1, products=None, rounds=16, **changes):
    """Rows of a ladder over `SIZES`: ours takes `time_us(size)`, its quartiles are `spread` of it apart."""
    found = []
    for size in (None, *SIZES):
        times = {"ours": time_us(size) if size else 20.0, "yardstick": 4.0 * (size or 1), "floor": 0.5 * (size or 1)}
        for role, value in times.items():
            row = {"op": "soft_embedding", "axis": "K", "pass": "training", "dtype": "fp32", "threads": threads}
            row |= {"size": size, "role": role, "time_us": value, "rounds": rounds}
            row |= {"time_us_p25": value * (1 - spread / 2), "time_us_p75": value * (1 + spread / 2)}
            row |= {"floor_bytes": 100 + (size or 1), "floor_flops": products(size) if products and size else 0}
            found.append(row | MACHINE | changes)
    return found


def the_ladder(rows):
    (ladder,) = slopes.ladders(rows)
    return ladder


def test_the_slope_is_the_exponent_and_its_error_that_of_least_squares():
    ladder = the_ladder(invented(lambda size: 3 * size**1.5))
    value, error = ladder.slope("ours")
    of_median = math.sqrt(math.pi / 2) * 0.01 / 1.3489795 / math.sqrt(16)
    assert value == pytest.approx(1.5) and error == pytest.approx(of_median / (math.log(2) * math.sqrt(5)))
    assert ladder.slope("yardstick").value == pytest.approx(1) and ladder.slope("floor").value == pytest.approx(1)
    assert 0 < ladder.slope_of_work("floor_bytes") < 1 and ladder.slope_of_work("floor_flops") is None
    assert ladder.fixed_us() == 20.0


def test_a_point_with_close_quartiles_does_not_outweigh_the_others():
    """Those of few rounds may be close by chance: the last point alone then made a slope, and a narrow one."""
    rows = invented(lambda size: size if size < 512 else 1.1 * size, spread=0.2)
    slope = the_ladder(rows).slope("ours")
    for row in rows:
        if row["size"] == 512:
            row |= {"time_us_p25": 0.9999 * row["time_us"], "time_us_p75": 1.0001 * row["time_us"]}
    found = the_ladder(rows).slope("ours")
    assert found.value == pytest.approx(slope.value) and found.error == pytest.approx(
        slope.error * math.sqrt(3 / 4), 1e-3
    )


@pytest.mark.parametrize(
    "time_us, spread, is_faster",
    [
        (lambda size: size, 0.01, False),
        (lambda size: size**1.05, 0.01, True),
        (lambda size: size**1.05, 1.0, False),
        (lambda size: size**2, 1.0, True),
        (lambda size: 200 + size**0.9, 0.001, False),
        (lambda size: size if size < 512 else 1.2 * size, 0.01, True),
    ],
    ids=["proportional", "faster", "within its spread", "much faster", "slower", "from the last size on"],
)
def test_what_grows_faster_than_its_work_is_marked(time_us, spread, is_faster):
    rows = invented(time_us, spread, products=lambda size: 7 * size)
    found = slopes.ladders(rows)
    assert slopes.is_faster(found[0], num_ladders=40) == is_faster
    (line,) = slopes.lines(found, "soft_embedding")
    assert (
        line[slopes.HEADER.index("faster than its work")].startswith("by 0." if time_us(2) < 4 else "by 1.")
        == is_faster
    )


def test_time_may_grow_as_fast_as_the_faster_of_bytes_and_multiplications():
    products = lambda size: 1000 + size**1.5  # noqa: E731
    between = lambda size: 0.2 * (100 + size) + 0.1 * products(size)  # noqa: E731
    for time_us, is_faster in ((products, False), (between, False), (lambda size: size * products(size), True)):
        ladder = the_ladder(invented(time_us, 1e-3, products=products))
        assert slopes.is_faster(ladder, num_ladders=1) == is_faster
    assert slopes.is_faster(the_ladder(invented(products, 1e-3)), num_ladders=1)  # of bytes alone


def test_a_mark_needs_more_where_more_ladders_are_looked_at():
    ladder = the_ladder(invented(lambda size: size, 0.01, products=lambda size: size))
    excess = ladder.excess()
    rows = invented(lambda size: size ** (1 + 2.5 * excess.error), 0.01, products=lambda size: size)
    assert slopes.is_faster(the_ladder(rows), num_ladders=1) and not slopes.is_faster(the_ladder(rows), num_ladders=40)


def test_the_page_has_a_line_for_each_case_and_the_newest_run_of_it():
    rows = invented(lambda size: 2.0 * size**1.5) + invented(lambda size: size**1.5, threads=2)
    rows += invented(lambda size: 9.0 * size**3, date="2026-11-01T00:00:00+00:00", commit="fedcba987654")
    said = results_page.scaling_text(rows)
    assert "Imaginary CPU, 1 and 2 threads, avx512, torch 2.13.0; commit 0123456789ab, 2026-12-01." in said
    (line,) = [line for line in said.splitlines() if line.startswith("| K 64 to 512, training fp32 |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["1.50 ± 0.00; 1.50 ± 0.00", "1.00; 1.00", "1.00; 1.00"]
    assert cells[6].count("by 0.") == 2 and cells[-1] == "2.00x"
    assert cells[-2] == "20 us, 2 %; 20 us, 4 %"
    assert "No device has been measured." in results_page.scaling_text([])


@pytest.mark.parametrize("name", command.OPS)
def test_every_dimension_has_a_ladder_in_which_it_alone_grows(name):
    op = command.OPS[name]
    dimensions = op.SHAPE_FORM.split("x")
    assert list(command.SIZES[name].first_shapes) == dimensions
    assert set(command.SIZES[name].passes) >= {"forward", "training"}
    for place, axis in enumerate(dimensions):
        shapes = command.ladder_shapes(op, axis, command.parse_arguments([]).doublings)
        assert len(shapes) >= 4 and shapes[-1][place] == 8 * shapes[0][place]
        assert len({shape[:place] + shape[place + 1 :] for shape in shapes}) == 1


def test_cases_of_several_numbers_of_threads_share_rounds_and_leave_torch_as_it_was():
    before, seen = torch.get_num_threads(), []

    def case(threads):
        note = harness.Implementation("note", lambda: lambda: seen.append(torch.get_num_threads()), role="floor")
        return harness.Case("op", "pass", (1, 1), "fp32", "flat", torch.device("cpu"), 8, [note], None, threads=threads)

    rows = harness.run_cases([case(1), case(2)], harness.Settings(rounds=4, seconds=60.0))
    assert [row["threads"] for row in rows] == [1, 2] and [row["rounds"] for row in rows] == [4, 4]
    assert torch.get_num_threads() == before
    # what is checked first, then in each round an untimed and a timed call of either
    checks, rounds = seen[:-16], seen[-16:]
    assert checks == sorted(checks) and set(checks) == {1, 2}
    assert all(sorted(rounds[i : i + 4]) == [1, 1, 2, 2] for i in range(0, 16, 4))


@pytest.mark.slow
def test_a_run_leaves_rows_from_which_the_page_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine_info, "copy_gbps", lambda device: 1.0)
    monkeypatch.setattr(machine_info, "gemm_gflops", lambda device, name: 1.0)
    first = {"N": (64, 64), "V": (64, 64)}
    monkeypatch.setitem(command.SIZES, "cross_entropy", command.Sizes(("training", "stats"), first, (1, 32)))
    path = tmp_path / "scaling/rows.jsonl"
    options = ["--op", "cross_entropy", "--axis", "V", "--dtype", "fp32", "--threads", "1", "2", "--rounds", "3"]
    assert command.main([*options, "--doublings", "1", "--output", str(path)]) == 0
    rows = report.read_rows(path)
    assert len(rows) == 3 * 2 * 2 * 3 and all(row["status"] == "ok" and row["axis"] == "V" for row in rows)
    assert {row["size"] for row in rows} == {None, 64, 128} and all(row["commit"] for row in rows)
    ours = {row["implementation"] for row in rows if row["role"] == "ours"}
    assert ours == {"auxkernels", "auxkernels logit_stats"}
    assert [ladder[:5] for ladder in slopes.ladders(rows)] == [
        ("cross_entropy", "V", name, "fp32", threads) for name in ("stats", "training") for threads in (1, 2)
    ]
    said = results_page.sections(tmp_path, tmp_path / "performance.md")["scaling"]
    assert "| V 64 to 128, training fp32 |" in said and "V 64 to 128, training fp32" in capsys.readouterr().out
