"""The files of a `BaseCache`: interrupted anywhere and written on, damaged, exchanged, hostile."""

import copy
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from cached import examples_of, packed_examples, saved_base
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from auxkernels.models import BaseCache
from auxkernels.models.base_cache import CachePlan, data_fingerprint, tokenizer_fingerprint

OPTIONS = {"batch_size": 2, "shard_bytes": 700}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def plan(base):
    return CachePlan(base, examples_of(), trunk_layers=[1], **OPTIONS)


@pytest.fixture(scope="module")
def written(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "cache"
    plan.write(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "cache"))


def contents(folder):
    return {one.name: one.read_bytes() for one in Path(folder).iterdir()}


# -- the format --------------------------------------------------------------------------------------------------------


def test_a_shard_is_a_safetensors_file(written, plan):
    fields = {field.name: field for field in plan.manifest.fields("shard-000001")}
    with safe_open(written / "shard-000001.safetensors", framework="pt") as file:
        assert file.metadata() == {"manifest": plan.manifest.key, "part": "shard-000001"}
        assert set(file.keys()) == set(fields) == {"offsets", "input_ids", "hidden", "lse", "trunk.1"}
        for name, field in fields.items():
            assert file.get_tensor(name).shape == field.shape and file.get_tensor(name).dtype == field.dtype


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_an_odd_number_of_tokens_leaves_every_tensor_aligned(base, dtype, tmp_path):
    cache = BaseCache.create(tmp_path / "cache", base, packed_examples(((2, 1),)), dtype=dtype, trunk_layers=[0])
    tensors = load_file(tmp_path / "cache/shard-000000.safetensors")
    assert torch.equal(tensors["hidden"], cache[0]["base_hidden_states"])
    assert torch.equal(tensors["position_ids"].long(), cache[0]["position_ids"])


def test_two_writings_are_equal_to_the_byte(plan, written, tmp_path):
    plan.write(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(written)


# -- interrupted -------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    pass


def stop_at(monkeypatch, name, number, is_done):
    """Lets the call of that number of a function of `os` fail, done or not: a write, when half of it is done."""
    original, calls = getattr(os, name), []

    def call(*args):
        calls.append(args)
        if len(calls) != number:
            return original(*args)
        if name == "write":
            original(args[0], args[1][: len(args[1]) // 2])
        elif is_done:
            original(*args)
        raise Stopped

    monkeypatch.setattr(os, name, call)
    return calls


@pytest.mark.parametrize(
    "name, is_done", [("write", False), ("fsync", False), ("fsync", True), ("replace", False), ("replace", True)]
)
def test_a_writing_that_stops_anywhere_is_resumed_to_the_byte(plan, written, name, is_done, monkeypatch, tmp_path):
    want, number, has_stopped = contents(written), 0, True
    while has_stopped:
        number, folder = number + 1, tmp_path / str(number)
        with monkeypatch.context() as patch:
            calls = stop_at(patch, name, number, is_done)
            try:
                plan.write(folder)
                has_stopped = False
            except Stopped:
                pass
        if contents(folder) != want:
            with pytest.raises(FileNotFoundError, match=r"holds no BaseCache|is missing, the cache is not whole"):
                BaseCache.open(folder)
        plan.write(folder)
        assert contents(folder) == want
        BaseCache.open(folder, verify=True)
    num_files = 2 * len(plan.manifest.parts) + 1
    assert len(calls) == number - 1 >= {"write": num_files + 1, "fsync": 2 * num_files, "replace": num_files}[name]


def test_a_file_is_on_the_disk_before_it_is_in_its_place_and_the_folder_behind(plan, monkeypatch, tmp_path):
    called = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def call(*args, name=name, original=original):
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            called.append("folder" if is_folder else os.path.basename(args[1]) if name == "replace" else "file")
            original(*args)

        monkeypatch.setattr(os, name, call)
    plan.write(tmp_path / "cache")
    names = [f"{part}.{ending}" for part in plan.manifest.parts for ending in ("safetensors", "json")]
    assert called == [one for name in ("manifest.json", *names) for one in ("file", name, "folder")]


def test_only_missing_shards_are_computed(plan, folder, written):
    assert len(plan.manifest.shards) > 3
    (folder / "shard-000001.json").unlink()
    (folder / "shard-000003.safetensors").unlink()
    seen = []
    hook = plan.base.model.register_forward_hook(lambda module, args, kwargs, output: seen.append(1), with_kwargs=True)
    plan.write(folder)
    hook.remove()
    first = [sum(count for count, _ in plan.manifest.shards[:k]) for k in (1, 3)]
    sizes = [plan.manifest.shards[k][0] for k in (1, 3)]
    batches = sum(-(-size // 2) for size in sizes)
    assert len(seen) == batches and first[0] < first[1]
    assert contents(folder) == contents(written)


def test_what_an_earlier_writing_has_left_is_overwritten(plan, written, folder):
    (folder / "shard-000001.safetensors").unlink()
    (folder / ".shard-000001.safetensors.part").write_bytes(b"x" * 10**5)
    plan.write(folder)
    assert contents(folder) == contents(written)


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {helpers!r})
from cached import examples_of
from auxkernels.models.base_cache import CachePlan
plan, write, left = CachePlan({base!r}, examples_of(), trunk_layers=[1], **{options!r}), os.write, [{number}]
def dying(file, data):
    left[0] -= 1
    if not left[0]:
        write(file, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, data)
os.write = dying
plan.write({folder!r})
"""


@pytest.mark.slow
def test_a_killed_process_is_resumed_to_the_byte(plan, written, tmp_path):
    folder, helpers = str(tmp_path / "cache"), str(Path(__file__).parent)
    name = plan.base.config.name_or_path
    program = PROGRAM.format(helpers=helpers, base=name, options=OPTIONS, number=16, folder=folder)
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert "shard-000000.json" in os.listdir(folder) and any(one.endswith(".part") for one in os.listdir(folder))
    plan.write(folder)
    assert contents(folder) == contents(written)


def test_two_processes_do_not_write_one_folder(plan, tmp_path):
    from auxkernels.models.base_cache.files import only_writer

    (tmp_path / "cache").mkdir()
    with only_writer(str(tmp_path / "cache")), pytest.raises(BlockingIOError, match="written by another process"):
        plan.write(tmp_path / "cache")
    plan.write(tmp_path / "cache")


def test_a_disk_with_too_little_space_is_said_before_the_base_runs(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(OSError, match="bytes are needed, 100 are free"):
        plan.write(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == ["manifest.json"]


def test_examples_that_change_between_two_readings_are_refused(base, tmp_path):
    class Changing(list):
        readings = 0

        def __getitem__(self, index):
            self.readings += 1
            return super().__getitem__(index) if self.readings <= len(self) else {"input_ids": [5, 6]}

    with pytest.raises(ValueError, match=r"examples\[0\] must be the same whenever it is read"):
        BaseCache.create(tmp_path / "cache", base, Changing(examples_of()))


# -- another cache in the folder ---------------------------------------------------------------------------------------


def other_base(base):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    return other


@pytest.mark.parametrize(
    "changed, field",
    [
        ({"base": other_base}, "base.fingerprint"),
        ({"examples": lambda base: examples_of(seed=1)}, "data"),
        ({"dtype": "float32"}, "dtype"),
        ({"lse": False}, "has_lse"),
        ({"trunk_layers": [0]}, "trunk_layers"),
        ({"batch_size": 3}, "batch_size"),
        ({"padding_side": "left"}, "padding_side"),
        ({"pad_token_id": 3}, "pad_token_id"),
        ({"autocast": "bfloat16"}, "autocast"),
        ({"shard_bytes": 7000}, "shards"),
        ({"base_revision": "v2"}, "base.revision"),
        ({"tokenizer": lambda base: tokenizer_of("a")}, "tokenizer"),
        ({"software": "9.9"}, "software.torch"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_writing_with_other_arguments_is_refused_by_name(base, folder, changed, field, monkeypatch):
    changed = {name: value(base) if callable(value) else value for name, value in changed.items()}
    if (version := changed.pop("software", None)) is not None:
        monkeypatch.setattr(torch, "__version__", version)
    options = {"trunk_layers": [1], **OPTIONS, "base": base, "examples": examples_of(), **changed}
    before = contents(folder)
    with pytest.raises(ValueError, match=f"holds a cache with another {field},"):
        BaseCache.create(folder, options.pop("base"), options.pop("examples"), **options)
    assert contents(folder) == before


def test_a_folder_with_something_else_is_refused(plan, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"path must be a new or empty folder.*notes\.txt"):
        plan.write(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


# -- what is expected --------------------------------------------------------------------------------------------------


def tokenizer_of(*tokens):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))


def test_what_is_expected_is_found(base, tmp_path):
    tokenizer, examples = tokenizer_of("a", "b"), examples_of()
    BaseCache.create(tmp_path / "cache", base, examples, tokenizer=tokenizer, trunk_layers=[0, 2])
    by_hash = {"tokenizer": tokenizer_fingerprint(tokenizer), "data": data_fingerprint(examples)}
    for expected in (by_hash, {"tokenizer": tokenizer, "data": examples, "base": base}):
        BaseCache.open(tmp_path / "cache", dtype="bfloat16", trunk_layers=[2], is_packed=False, **expected)


@pytest.mark.parametrize(
    "expected, message",
    [
        ({"base": other_base}, "base of the cache .* must be the model that is meant"),
        ({"tokenizer": lambda base: tokenizer_of("a", "c")}, "tokenizer of the cache .* must be '[0-9a-f]*', got None"),
        ({"data": lambda base: examples_of()[::-1]}, "data of the cache"),
        ({"data": "0" * 64}, "data of the cache"),
        ({"dtype": torch.float32}, "dtype of the cache .* must be 'float32', got 'bfloat16'"),
        ({"trunk_layers": [0, 1]}, r"trunk_layers of the cache .* must be \[0, 1\], got \[1\]"),
        ({"is_packed": True}, "is_packed of the cache .* must be True, got False"),
    ],
)
def test_what_is_not_as_expected_is_named(base, written, expected, message):
    expected = {name: value(base) if callable(value) else value for name, value in expected.items()}
    with pytest.raises(ValueError, match=message):
        BaseCache.open(written, **expected)


# -- damaged -----------------------------------------------------------------------------------------------------------

PARTS = ["head", "shard-000000", "shard-000002"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder, plan, part, left):
    path = folder / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    for opening in (lambda: BaseCache.open(folder), lambda: plan.write(folder)):
        with pytest.raises(ValueError, match=rf"{part}\.safetensors must have \d+ bytes, got \d+"):
            opening()


@pytest.mark.parametrize("part", PARTS)
def test_a_file_with_more_bytes_is_named(folder, part):
    with open(folder / f"{part}.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=rf"{part}\.safetensors must have"):
        BaseCache.open(folder)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_missing_file_is_named(folder, part, ending):
    (folder / f"{part}.{ending}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{part}\.{ending} is missing"):
        BaseCache.open(folder)


def equal_shards(base, folder):
    """A cache of two shards of one size."""
    BaseCache.create(folder, base, examples_of([6, 6]), batch_size=1, shard_bytes=1)
    return folder


@pytest.mark.parametrize("endings", [["safetensors"], ["safetensors", "json"]])
def test_exchanged_shards_are_named(base, endings, tmp_path):
    folder = equal_shards(base, tmp_path / "cache")
    for ending in endings:
        names = [folder / f"shard-00000{k}.{ending}" for k in (0, 1)]
        first, second = (one.read_bytes() for one in names)
        names[0].write_bytes(second)
        names[1].write_bytes(first)
    with pytest.raises(
        ValueError, match=r"shard-000000\.safetensors must be shard-000000 of this cache, got 'shard-0000"
    ):
        BaseCache.open(folder)


def test_a_shard_of_another_cache_is_named(base, tmp_path):
    folder = equal_shards(base, tmp_path / "cache")
    BaseCache.create(tmp_path / "other", base, examples_of([6, 6], seed=2), batch_size=1, shard_bytes=1)
    for ending in ("safetensors", "json"):
        shutil.copy(tmp_path / f"other/shard-000001.{ending}", folder)
    with pytest.raises(ValueError, match=r"shard-000001\.safetensors must be .* written under another manifest"):
        BaseCache.open(folder)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("place", [-1, -40])
def test_an_edited_file_is_named(folder, part, place):
    path = folder / f"{part}.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    cache = BaseCache.open(folder)
    for check in (cache.verify, lambda: BaseCache.open(folder, verify=True)):
        with pytest.raises(ValueError, match=rf"{part}\.safetensors has another SHA-256 than was written"):
            check()
    if part == "head":
        with pytest.raises(ValueError, match=r"head\.safetensors has another SHA-256"):
            cache.base_head()


@pytest.mark.parametrize("place", [0, 7, 20, 60])
def test_an_edited_header_is_named(folder, place):
    path = folder / "shard-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000001\.safetensors must be shard-000001 of this cache"):
        BaseCache.open(folder)


@pytest.mark.parametrize("offsets", [[0, 1, -2], [0, 5, 5], [1, 6, 14], [0, 2**62, 14], [0, 20, 14]], ids=str)
def test_offsets_that_lead_elsewhere_are_named(folder, offsets, plan):
    path = folder / "shard-000000.safetensors"
    assert plan.manifest.shards[0] == [2, 14]
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin : begin + 24] = torch.tensor(offsets).numpy().tobytes()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"offsets in .*shard-000000\.safetensors must ascend from 0 to 14"):
        BaseCache.open(folder)[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must hold bytes and sha256"),
        ("[]", "must hold bytes and sha256"),
        ('{"bytes": 3, "sha256": "00"}', r"must say \d+ bytes, got 3"),
        ('{"bytes": -1, "sha256": "00", "path": "../x"}', "must hold bytes and sha256"),
    ],
)
def test_a_checksums_file_that_is_none_is_named(folder, text, message):
    (folder / "shard-000001.json").write_text(text)
    with pytest.raises(ValueError, match=rf"shard-000001\.json {message}"):
        BaseCache.open(folder)


def test_a_damaged_shard_is_computed_again_when_it_is_removed(folder, plan, written):
    path = folder / "shard-000001.safetensors"
    path.write_bytes(b"")
    path.unlink()
    (folder / "shard-000001.json").unlink()
    plan.write(folder)
    assert contents(folder) == contents(written)


# -- hostile manifests -------------------------------------------------------------------------------------------------


def edited(folder, **changed):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in changed.items():
        if value is None and name not in ("tokenizer", "base"):
            del manifest[name]
        else:
            manifest[name] = value
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"format": "other"}, "format in .* must be 'auxkernels.base_cache'"),
        ({"version": 2}, "version in .* must be 1, got 2"),
        ({"version": True}, "version in .* must be 1, got True"),
        ({"shards": None}, "lacks shards"),
        ({"paths": ["../../etc/passwd"]}, "has the unknown field paths"),
        ({"shards": []}, r"shards in .* must be a list of \[examples, tokens\]"),
        ({"shards": [["../x", 3]]}, "shards in"),
        ({"shards": [[-1, 3]]}, "shards in"),
        ({"shards": [[1, -3]]}, "shards in"),
        ({"shards": [[2, 1]]}, "shards in"),
        ({"shards": [[1, 2**63]]}, "shards in"),
        ({"shards": [[1, 2, 3]]}, "shards in"),
        ({"shards": [[1, 2.0]]}, "shards in"),
        ({"shards": {"0": [1, 2]}}, "shards in"),
        ({"hidden_size": 0}, "hidden_size in .* must be a positive integer, got 0"),
        ({"hidden_size": 2**70}, "hidden_size in"),
        ({"hidden_size": 12}, r"head_shape in .* must be \[V, hidden_size\]"),
        ({"trunk_size": "24"}, "trunk_size in"),
        ({"trunk_layers": [1, 0]}, "trunk_layers in .* must be ascending"),
        ({"trunk_layers": [1, 1]}, "trunk_layers in"),
        ({"trunk_layers": [-1]}, "trunk_layers in"),
        ({"dtype": "int64"}, "dtype in .* must be one of bfloat16"),
        ({"dtype": ["bfloat16"]}, "dtype in"),
        ({"has_lse": 1}, "has_lse in .* must be true or false"),
        ({"batch_size": -8}, "batch_size in"),
        ({"padding_side": "top"}, "padding_side in"),
        ({"pad_token_id": -1}, "pad_token_id in"),
        ({"autocast": "float32"}, "autocast in .* must be null or one of bfloat16, float16"),
        ({"autocast": {}}, "autocast in"),
        ({"head_shape": [61]}, "head_shape in"),
        ({"head_dtype": "uint8"}, "head_dtype in"),
        ({"data": "x" * 64}, "data in .* must be 64 hexadecimal digits"),
        ({"tokenizer": 3}, "tokenizer in"),
        ({"base": {"config": {}}}, "base in .* must be an object of"),
        ({"base": None}, "base in"),
        ({"software": [1]}, "software in"),
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be_is_refused_by_the_fields_name(folder, changed, message):
    edited(folder, **changed)
    with pytest.raises(ValueError, match=message):
        BaseCache.open(folder)


@pytest.mark.parametrize("changed", [{"batch_size": 4}, {"data": "0" * 64}, {"trunk_layers": [0]}], ids=str)
def test_a_manifest_that_was_edited_is_not_that_of_the_shards(folder, changed):
    edited(folder, **changed)
    with pytest.raises(ValueError, match=r"head\.safetensors must be head of this cache.*under another manifest"):
        BaseCache.open(folder)


def test_a_manifest_that_is_written_otherwise_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="was edited"):
        BaseCache.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "\x00"])
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json (is not JSON|must be)|format in"):
        BaseCache.open(folder)


def test_a_folder_without_a_cache_is_said_to_be_none(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="holds no BaseCache"):
            BaseCache.open(path)


def test_checksums_are_those_of_the_files(written):
    for one in written.glob("*.safetensors"):
        said = json.loads(one.with_suffix(".json").read_text())
        assert said == {"bytes": one.stat().st_size, "sha256": hashlib.sha256(one.read_bytes()).hexdigest()}
