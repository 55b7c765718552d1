from __future__ import annotations

import numpy as np
import pytest

from npgpt import parameters
from npgpt.config import PUBLISHED
from npgpt.errors import NpgptError
from tests.support.models import SHAPES, random_arrays, small

BLOCK = {
    "ln_1.weight": (768,),
    "ln_1.bias": (768,),
    "attn.c_attn.weight": (768, 2304),
    "attn.c_attn.bias": (2304,),
    "attn.c_proj.weight": (768, 768),
    "attn.c_proj.bias": (768,),
    "ln_2.weight": (768,),
    "ln_2.bias": (768,),
    "mlp.c_fc.weight": (768, 3072),
    "mlp.c_fc.bias": (3072,),
    "mlp.c_proj.weight": (3072, 768),
    "mlp.c_proj.bias": (768,),
}


def test_the_schema_of_gpt2_is_the_hubs() -> None:
    schema: dict[str, tuple[int, ...]] = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    schema |= {f"h.{layer}.{name}": shape for layer in range(12) for name, shape in BLOCK.items()}
    schema |= {"ln_f.weight": (768,), "ln_f.bias": (768,)}
    assert parameters.schema(PUBLISHED["gpt2"]) == schema
    assert len(schema) == 148


def test_an_untied_head_and_an_inner_width_are_in_the_schema() -> None:
    schema = parameters.schema(small(n_inner=17, tie_word_embeddings=False))
    assert schema["lm_head.weight"] == (40, 21)
    assert schema["h.1.mlp.c_fc.weight"] == (21, 17)
    assert schema["h.1.mlp.c_proj.weight"] == (17, 21)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("distilgpt2", 81_912_576),
    ],
)
def test_counts_are_the_published_ones(name: str, total: int) -> None:
    assert sum(parameters.count(PUBLISHED[name]).values()) == total


def test_counts_by_part() -> None:
    assert parameters.count(PUBLISHED["gpt2"]) == {
        "wte": 38_597_376,
        "wpe": 786_432,
        "h.*.ln_1": 18_432,
        "h.*.attn.c_attn": 21_261_312,
        "h.*.attn.c_proj": 7_087_104,
        "h.*.ln_2": 18_432,
        "h.*.mlp.c_fc": 28_348_416,
        "h.*.mlp.c_proj": 28_320_768,
        "ln_f": 1_536,
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(shape: str) -> None:
    arrays = random_arrays(SHAPES[shape])
    structure = parameters.from_arrays(SHAPES[shape], arrays)
    back = parameters.to_arrays(structure)
    assert set(back) == set(arrays)
    assert all(back[name] is arrays[name] for name in arrays)
    assert structure.h[0].attn.c_attn.weight is arrays["h.0.attn.c_attn.weight"]
    assert (structure.lm_head is structure.wte) == SHAPES[shape].tie_word_embeddings


def test_all_faults_come_in_one_message() -> None:
    arrays = random_arrays(small())
    arrays["h.0.ln_3.weight"] = arrays.pop("h.0.ln_2.weight")
    arrays["wpe.weight"] = arrays["wpe.weight"].T
    with pytest.raises(NpgptError) as error:
        parameters.from_arrays(small(), arrays)
    assert str(error.value) == (
        "the set of arrays does not fit its configuration: h.0.ln_2.weight is missing; h.0.ln_3.weight is unexpected; "
        "wpe.weight is [21, 24] and must be [24, 21]"
    )


def test_a_fault_of_every_block_is_told_once() -> None:
    arrays = {name: array for name, array in random_arrays(small()).items() if not name.endswith("attn.c_attn.bias")}
    with pytest.raises(NpgptError, match=r"configuration: h\.\*\.attn\.c_attn\.bias is missing \(in 2 blocks\)$"):
        parameters.from_arrays(small(), arrays)
    arrays = random_arrays(small()) | {f"extra.{n}": np.zeros(1) for n in range(60)}
    with pytest.raises(NpgptError, match=r"extra\.49 is unexpected; and 10 more$"):
        parameters.from_arrays(small(), arrays)


def test_a_wrong_depth_is_told_first() -> None:
    with pytest.raises(
        NpgptError, match=r"it has 2 blocks and n_layer is 4; h\.\*\.ln_1\.weight is missing \(in 2 blocks\)"
    ):
        parameters.from_arrays(small(n_layer=4), random_arrays(small()))
    with pytest.raises(NpgptError, match=r"configuration: h\.x is unexpected$"):
        parameters.from_arrays(small(), random_arrays(small()) | {"h.x": np.zeros(1)})


def test_dtypes_are_not_mixed() -> None:
    arrays = random_arrays(small())
    arrays["ln_f.bias"] = arrays["ln_f.bias"].astype(np.float32)
    with pytest.raises(NpgptError, match="float32, float64"):
        parameters.from_arrays(small(), arrays)
    with pytest.raises(NpgptError, match="float16"):
        parameters.from_arrays(small(), {name: array.astype(np.float16) for name, array in arrays.items()})
