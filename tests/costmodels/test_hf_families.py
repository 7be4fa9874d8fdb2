"""Model families: totals of the real modelling classes, and entries that mean something."""

import warnings

import pytest

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.hf_config import read_config
from moeplan.costmodels.hf_keys import FAMILIES, NAMES, load_family
from moeplan.records import load_yaml

# Parameters of the classes of transformers 5.23.0 built on the meta device from their own defaults. Text models that
# come without an output head (glm4v_moe_text, mistral4, muse_spark_text, step3p5) have vocabulary x hidden added.
CLASS_TOTALS = {
    "mixtral": 46702792704,
    "phimoe": 41872793600,
    "olmoe": 13361612800,
    "flex_olmo": 33270665216,
    "granitemoe": 37039116288,
    "granitemoeshared": 37039116288,
    "granitemoe_swa": 37039117312,
    "jamba": 51570323328,
    "gpt_oss": 116829156672,
    "llama4_text": 107769861120,
    "qwen2_moe": 14315784192,
    "qwen3_moe": 15350731776,
    "qwen3_vl_moe_text": 13173956608,
    "qwen3_next": 79674391296,
    "qwen3_5_moe_text": 34660610688,
    "deepseek_v3": 671026404352,
    "deepseek_v32": 671877929216,
    "deepseek_v4": 284325869015,
    "glm_moe_dsa": 743911199232,
    "glm4_moe_lite": 29943390976,
    "axk1": 518983052288,
    "mistral4": 118972826624,
    "kimi_linear": 49133074464,
    "bailing_hybrid": 124414191072,
    "glm4_moe": 103481200640,
    "glm4v_moe_text": 103480368448,
    "solar_open": 102651793408,
    "exaone_moe": 28550639616,
    "hy_v3": 295033528320,
    "mellum": 12149923072,
    "kolibri1": 78103055360,
    "flint": 39785287456,
    "laguna": 33189975808,
    "afmoe": 19232600000,
    "mimo_v2_flash": 308778768832,
    "minimax": 47373946880,
    "minimax_m2": 228689748992,
    "minimax_m3_vl_text": 447186441216,
    "cohere2_moe": 190004928512,
    "aria_text": 18517069824,
    "ernie4_5_moe": 21825437888,
    "nemotron_h": 1968355712,
    "step3p5": 195843833088,
    "muse_spark_text": 819990536192,
    "llama": 6738415616,
    "mistral": 7241732096,
    "ministral3": 8489553920,
    "granite": 6738415616,
    "phi3": 3821079552,
    "qwen2": 12049846272,
    "qwen3": 12049461248,
    "qwen3_5_text": 8953803264,
    "glm4": 9400279040,
    "olmo2": 6888624128,
    "olmo3": 6888624128,
    "exaone4": 9429069824,
    "seed_oss": 28921040896,
    "smollm3": 3075098624,
    "gemma": 8537680896,
    "gemma2": 2614341888,
    "gemma3_text": 2628658432,
    "cohere2": 34980831232,
    "starcoder2": 3030371328,
    "gpt_neox": 20554567680,
    "gpt2": 124439808,
    "mpt": 1311213568,
}


@pytest.mark.parametrize("model_type", CLASS_TOTALS)
def test_class_defaults_give_the_total_of_the_real_class(model_type):
    assert parameter_count(read_config({"model_type": model_type}, name="x")).total == CLASS_TOTALS[model_type]


def test_hybrid_of_mamba_and_experts():
    model = read_config({"model_type": "granitemoehybrid", "layer_types": ["mamba"] * 32}, name="x")
    assert parameter_count(model).total == 38601064448


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "qwen3_next", "gpt_oss", "gpt2"])
def test_class_totals_against_transformers(model_type):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", exc_type=ImportError)
        config = transformers.AutoConfig.for_model(model_type)
        with torch.device("meta"):
            real = transformers.AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in {id(p): p for p in real.parameters()}.values())
    assert parameter_count(read_config(config.to_dict(), name="x")).total == total


ENTRIES = load_yaml(FAMILIES, "families")


@pytest.mark.parametrize("model_type", ENTRIES)
def test_family_entries_use_known_meanings(model_type):
    entry, family = ENTRIES[model_type], load_family(model_type)
    assert set(entry.get("facts", {})) | set(entry.get("names", {})) <= set(NAMES)
    assert entry.get("like", "llama") in ENTRIES
    # Cutting one entry out of the file gives what parsing all of it gives.
    assert entry.get("keys", {}).items() <= family.keys.items()


@pytest.mark.parametrize("meaning", NAMES)
def test_names_of_a_meaning_are_distinct(meaning):
    assert len(NAMES[meaning]) == len(set(NAMES[meaning]))
