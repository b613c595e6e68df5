import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from actors.weights import check_shapes, digest, pack, read_safetensors, safetensors_shapes, unpack, verify

TENSORS = {
    "a.fp32": torch.randn(3, 5),
    "b.bf16": torch.randn(7, 1, 3).bfloat16(),
    "c.fp16": torch.randn(13).half(),
    "d.int64": torch.arange(-3, 2),
    "e.uint8": torch.tensor([250, 1, 0], dtype=torch.uint8),
    "f.bool": torch.tensor([True, False, True]),
    "g.scalar": torch.tensor(2.5),
    "h.empty": torch.empty(0, 4),
    "i.transposed": torch.randn(4, 6).t(),
}


def assert_same(found, expected):
    found = dict(found)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_round_trip_keeps_order_dtypes_shapes_and_values():
    bundle = pack(TENSORS.items(), version=3)
    assert bundle.version == 3
    assert bundle.shapes() == {name: tuple(t.shape) for name, t in TENSORS.items()}
    assert_same(unpack(bundle), TENSORS)
    verify(bundle)


def test_the_buffer_is_flat_bytes_and_the_tensors_are_views_of_it():
    bundle = pack(TENSORS.items(), version=0)
    assert bundle.buffer.dtype == np.uint8 and bundle.buffer.ndim == 1
    start = bundle.buffer.ctypes.data
    for name, tensor in unpack(bundle):
        if tensor.numel():
            assert start <= tensor.data_ptr() < start + bundle.buffer.nbytes, name


def test_round_trip_through_pickle_and_a_read_only_buffer(recwarn):
    bundle = pickle.loads(pickle.dumps(pack(TENSORS.items(), version=1), protocol=5))
    bundle.buffer.flags.writeable = False
    verify(bundle)
    assert_same(unpack(bundle), TENSORS)
    assert not recwarn.list


def test_dtype_casts_floating_point_only():
    unpacked = dict(unpack(pack(TENSORS.items(), version=0, dtype=torch.bfloat16)))
    assert unpacked["d.int64"].dtype == torch.int64
    assert unpacked["f.bool"].dtype == torch.bool
    assert torch.equal(unpacked["a.fp32"], TENSORS["a.fp32"].bfloat16())


def test_a_generator_may_reuse_its_tensor():
    def reusing():
        scratch = torch.empty(5)
        for value in range(3):
            yield f"t{value}", scratch.fill_(value)

    assert_same(unpack(pack(reusing(), version=0)), {f"t{v}": torch.full((5,), float(v)) for v in range(3)})


def test_packing_takes_no_part_in_autograd():
    parameter = torch.nn.Parameter(torch.ones(3))
    ((_, tensor),) = unpack(pack([("w", parameter)], version=0))
    assert not tensor.requires_grad


@pytest.mark.parametrize("where", [0, -1])
def test_one_flipped_byte_changes_the_checksum(where):
    bundle = pack(TENSORS.items(), version=4)
    again = pack(TENSORS.items(), version=4)
    assert bundle.checksum == again.checksum
    damaged = bundle.buffer.copy()
    damaged[where] ^= 1
    with pytest.raises(RuntimeError, match=f"version 4 arrived damaged.*{bundle.checksum}"):
        verify(dataclasses.replace(bundle, buffer=damaged))


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="w comes twice"):
        pack([("w", torch.ones(1)), ("w", torch.ones(1))], version=0)


def test_one_bad_number_is_found_wherever_it_lies_and_named():
    tensors = {
        "a": torch.ones(5), "b": torch.ones(()), "half": torch.ones(3, dtype=torch.float16), "count": torch.arange(7),
        "c": torch.ones(2), "none": torch.ones(0, 4), "d": torch.ones(1 << 19), "e": torch.ones(9), "f": torch.ones(1),
    }  # fmt: skip
    assert pack(tensors.items(), version=3).shapes() == {name: tuple(t.shape) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        if name in ("count", "none"):
            continue
        for spoiled in (float("nan"), float("inf"), -float("inf")):
            bad = tensor.clone()
            bad.view(-1)[-1] = spoiled
            with pytest.raises(RuntimeError, match=rf"version 3 are not handed out: {name} holds"):
                pack((tensors | {name: bad}).items(), version=3)
    with pytest.raises(RuntimeError, match="not handed out: d holds"):  # float16 ends at 65,504
        pack((tensors | {"d": torch.full((4,), 1e5)}).items(), version=3, dtype=torch.float16)


def test_nothing_packs_to_an_empty_bundle():
    bundle = pack([], version=0)
    assert list(unpack(bundle)) == []
    verify(bundle)


def test_read_safetensors_reads_every_shard(tmp_path):
    names = sorted(TENSORS)
    tensors = {name: TENSORS[name].contiguous() for name in names}
    save_file({n: tensors[n] for n in names[:4]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[4:]}, tmp_path / "model-00002-of-00002.safetensors")
    assert_same(sorted(read_safetensors(tmp_path)), {n: tensors[n] for n in names})
    assert safetensors_shapes(tmp_path) == {n: tuple(tensors[n].shape) for n in names}


def test_the_index_names_the_shards(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(read_safetensors(tmp_path), {"w": torch.ones(2)})


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no \\*.safetensors weights"):
        list(read_safetensors(tmp_path))


def test_check_shapes_names_what_is_wrong():
    expected = {"a": (2, 3), "b": (4,), "head": (5,)}
    check_shapes(dict(expected), expected=expected)
    check_shapes({"a": (2, 3), "b": (4,)}, expected=expected, optional={"head"})
    check_shapes({**expected, "extra": (1,)}, expected=expected, optional={"extra"})
    with pytest.raises(RuntimeError, match=r"missing \['b', 'head'\], unknown \['c'\]"):
        check_shapes({"a": (2, 3), "c": (4,)}, expected=expected)
    with pytest.raises(RuntimeError, match=r"a has shape \(3, 2\), expected \(2, 3\)"):
        check_shapes({**expected, "a": (3, 2)}, expected=expected)


def test_a_digest_is_of_names_and_every_bit():
    first = digest(TENSORS.items())
    assert digest((name, tensor.clone()) for name, tensor in TENSORS.items()) == first
    assert digest((name.upper(), tensor) for name, tensor in TENSORS.items()) != first
    for name in ("a.fp32", "b.bf16", "g.scalar"):
        changed = {other: tensor.clone() for other, tensor in TENSORS.items()}
        bits = changed[name].view(-1).view(torch.uint8)
        bits[-1] ^= 1
        assert digest(changed.items()) != first, name
