"""A checkpoint opens to the weights it holds, in the memory of the mapped file, and anything
damaged, missing, pickled or too large is refused with what was expected and what was found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from tierline.base.errors import DependencyError, DoesNotFitError, SpecError, TierlineError
from tierline.engine.checkpoint import Checkpoint, open_checkpoint
from tiny_checkpoints import tiny_checkpoint

SHAPES = {"a.weight": (3, 4), "b.weight": (5,), "c.weight": (2, 2, 2)}


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    safetensors.torch.save_file(tensors, folder / name)
    return folder


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", random_tensors())


def shards(folder: Path) -> Path:
    """The same tensors in two files with an index."""
    tensors = random_tensors()
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((["a.weight"], ["b.weight", "c.weight"])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        safetensors.torch.save_file({n: tensors[n] for n in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert checkpoint.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        assert checkpoint.tensor(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)


# What it holds


def test_a_folder_of_transformers_opens_to_the_weights_in_it(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3", tmp_path)
    expected = safetensors.torch.load_file(path / "model.safetensors")
    checkpoint = open_checkpoint(path)

    assert_holds(checkpoint, expected)
    assert checkpoint.config["architectures"] == ["Qwen3ForCausalLM"]
    assert checkpoint.weight_bytes == sum(t.nbytes for t in expected.values())
    assert checkpoint.dtype == torch.float32
    assert checkpoint.name == "tiny-qwen3"


def test_shards_open_as_one(folder: Path) -> None:
    assert_holds(open_checkpoint(shards(folder)), random_tensors())


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        torch.bool,
    ],
)
def test_every_type_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).view(2, 3).to(dtype)
    checkpoint = open_checkpoint(write(tmp_path / "model", {"x": tensor}))

    assert checkpoint.tensor("x").dtype == dtype
    assert torch.equal(checkpoint.tensor("x").float(), tensor.float())


def test_a_tensor_shares_the_pages_of_the_file(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    first, again = checkpoint.tensor("a.weight"), checkpoint.tensor("a.weight")

    assert first.data_ptr() == again.data_ptr()
    # Control: what has to be computed has memory of its own.
    assert checkpoint.tensor("a.weight", torch.bfloat16).data_ptr() != first.data_ptr()


def test_writing_into_a_tensor_never_reaches_the_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    open_checkpoint(folder).tensor("a.weight").zero_()

    assert (folder / "model.safetensors").read_bytes() == before


def test_data_at_odd_places_and_empty_tensors_are_read(tmp_path: Path) -> None:
    """The format aligns the data by padding its header; not every writer does."""
    header = json.dumps(
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "nothing": {"dtype": "F32", "shape": [0, 4], "data_offsets": [8, 8]},
        }
    )
    header += " " * (len(header) % 2 == 0)
    data = torch.tensor([1.5, -2.0])
    raw = len(header).to_bytes(8, "little") + header.encode() + data.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(raw)
    (tmp_path / "config.json").write_text("{}")

    assert_holds(open_checkpoint(tmp_path), {"x": data, "nothing": torch.empty(0, 4)})


def test_released_pages_come_back_when_touched(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    early = checkpoint.tensor("a.weight")
    checkpoint.release()
    checkpoint.release()

    assert torch.equal(early, random_tensors()["a.weight"])
    assert_holds(checkpoint, random_tensors())


def resident_bytes() -> int:
    """Pages of mapped files in this process's memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssFile:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="counts pages as Linux does")
def test_release_gives_the_pages_back(tmp_path: Path) -> None:
    size_bytes = 64 << 20
    path = write(tmp_path / "model", {"x": torch.ones(size_bytes // 4)})
    checkpoint = open_checkpoint(path)
    before = resident_bytes()
    tensor = checkpoint.tensor("x")
    tensor.sum()
    mapped = resident_bytes()
    checkpoint.release()
    after = resident_bytes()

    assert mapped - before > 0.9 * size_bytes  # control: they counted
    assert after - before < 0.1 * size_bytes


# Its revision


def test_the_revision_tells_weights_names_and_configs_apart(tmp_path: Path) -> None:
    one = write(tmp_path / "model", random_tensors())
    same = open_checkpoint(one).revision
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.copytree(one, tmp_path / "elsewhere" / "model"))

    assert open_checkpoint(moved).revision == same
    write(moved, random_tensors(seed=1))
    assert open_checkpoint(moved).revision != same
    renamed = Path(shutil.copytree(one, tmp_path / "renamed"))
    assert open_checkpoint(renamed).revision != same
    (one / "config.json").write_text('{"architectures": ["Other"]}')
    assert open_checkpoint(one).revision != same


# Damage


def edit_header(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])

    return edit


def rewrite(name: str, content: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return edit


def append(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")


def nest(folder: Path) -> None:
    text = b"[" * 100_000
    rewrite("model.safetensors", len(text).to_bytes(8, "little") + text)(folder)


def lose_a_shard(folder: Path) -> None:
    (shards(folder) / "model-00002-of-00002.safetensors").unlink()


def swap_the_index(folder: Path) -> None:
    index = shards(folder) / "model.safetensors.index.json"
    text = index.read_text().replace("00002-of", "x").replace("00001-of", "00002-of")
    index.write_text(text.replace("x", "00001-of"))


def climb_out(folder: Path) -> None:
    index = shards(folder) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "../../secret.safetensors"}}))


def twice(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (rewrite("model.safetensors", b""), "empty"),
    (rewrite("model.safetensors", b"abc"), "only 3 bytes"),
    (rewrite("model.safetensors", b"\xff" * 64), "its header should take"),
    (rewrite("model.safetensors", (4).to_bytes(8, "little") + b"{]{]"), "not JSON"),
    (rewrite("model.safetensors", (2).to_bytes(8, "little") + b"[]"), "not a JSON object"),
    (nest, "not JSON"),
    (append, "accounts for"),
    (edit_header(lambda h: h["a.weight"].update(dtype="F4")), "has type 'F4'"),
    (edit_header(lambda h: h["a.weight"].update(shape=[3, 5])), r"takes 60 bytes, found 48"),
    (edit_header(lambda h: h["a.weight"].update(shape=[-3, -4])), r"has shape \[-3, -4\]"),
    (edit_header(lambda h: h["a.weight"].update(shape=[True, 12])), "has shape"),
    (edit_header(lambda h: h["a.weight"].update(data_offsets=[0, 10**30])), "takes bytes"),
    (edit_header(lambda h: h["a.weight"].update(data_offsets=[4, 52])), "starts at byte"),
    (edit_header(lambda h: h["a.weight"].pop("shape")), "is not a tensor"),
    (edit_header(lambda h: h.pop("b.weight")), "starts at byte|accounts for"),
    (edit_header(lambda h: h.clear()), "accounts for"),
    (rewrite("config.json", b"{"), "is not JSON"),
    (rewrite("config.json", b"[]"), "is not a JSON object"),
    (rewrite("config.json", b"\xff\xfe"), "not UTF-8"),
    (lambda folder: (folder / "config.json").unlink(), "cannot read"),
    (lose_a_shard, "lacks 1 of 2 files: model-00002-of-00002"),
    (swap_the_index, "the index says"),
    (climb_out, "not an object of file names"),
    (twice, "lies in another file"),
    (pickle_only, "pickled"),
    (no_weights, "no .safetensors files"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_refused_and_said(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    open_checkpoint(folder)  # control: whole before
    damage(folder)

    with pytest.raises(TierlineError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.safetensors", "nothing.gguf"])
def test_what_is_no_checkpoint_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(SpecError):
        open_checkpoint(folder / name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = write(tmp_path_factory.mktemp("whole") / "model", random_tensors())
    return folder, (folder / "model.safetensors").read_bytes()


@given(st.data())
def test_truncated_anywhere_it_is_refused(whole: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, raw = whole
    cut = data.draw(st.integers(0, len(raw) - 1))
    (folder / "model.safetensors").write_bytes(raw[:cut])

    with pytest.raises(SpecError):
        open_checkpoint(folder)


@given(st.data())
def test_with_a_byte_changed_it_opens_as_the_reference_reads_it_or_is_refused(
    whole: tuple[Path, bytes], data: st.DataObject
) -> None:
    folder, raw = whole
    header_bytes = 8 + int.from_bytes(raw[:8], "little")
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    path = folder / "model.safetensors"
    path.write_bytes(bytes(changed))
    try:
        checkpoint = open_checkpoint(folder)
    except SpecError:
        return

    reference = safetensors.torch.load_file(path)
    assert checkpoint.shapes == {name: tuple(t.shape) for name, t in reference.items()}
    for name, tensor in reference.items():
        assert checkpoint.tensor(name).numpy().tobytes() == tensor.numpy().tobytes()


def test_a_file_that_shrinks_after_opening_is_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.release()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])

    with pytest.raises(DependencyError, match="changed while"):
        checkpoint.tensor("a.weight")


# What the network expects, what the machine has


def test_what_is_missing_or_of_another_shape_is_listed(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.require(SHAPES)  # control

    with pytest.raises(SpecError) as caught:
        checkpoint.require(SHAPES | {"a.weight": (4, 3), "head.weight": (7,)})

    assert "a.weight: expected [4, 3], found [3, 4]" in str(caught.value)
    assert "head.weight: expected [7], found nothing" in str(caught.value)
    with pytest.raises(SpecError, match="and 92 more"):
        checkpoint.require({f"x{n}": (1,) for n in range(100)})


@pytest.mark.parametrize(
    ("available_bytes", "dtype", "hint"),
    [
        (99, torch.float32, "bfloat16 would fit"),
        (49, torch.float32, "billion weights fit"),
        (150, torch.float64, "bfloat16 would fit"),
        (99, None, "billion weights fit"),
    ],
)
def test_too_large_says_what_would_fit(
    folder: Path, available_bytes: int, dtype: torch.dtype | None, hint: str
) -> None:
    """25 weights in float32: 100 bytes."""
    checkpoint = open_checkpoint(folder)
    checkpoint.require_fits(100)
    checkpoint.require_fits(100, dtype=torch.float32)
    checkpoint.require_fits(50, dtype=torch.bfloat16)

    with pytest.raises(DoesNotFitError) as caught:
        checkpoint.require_fits(available_bytes, dtype=dtype)

    assert hint in caught.value.hint
    assert caught.value.available_bytes == available_bytes
