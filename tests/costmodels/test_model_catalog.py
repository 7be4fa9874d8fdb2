"""The model catalog: exact totals, published names, files of users."""

import json
import subprocess
import sys

import pytest
import yaml

from moeplan.costmodels.counts import parameter_count
from moeplan.costmodels.hf_keys import load_family
from moeplan.costmodels.model_catalog import MODELS, catalog_model, load_model, model_aliases, model_names
from moeplan.errors import FileError, ModelError, SchemaError, UnknownNameError

# Parameters of the real modelling classes (transformers 5.23.0, meta device), to the last one. The class of LongCat
# also allocates rows for its zero experts, and no class exists for the rest of the last group: those are counts from
# the published sizes.
EXACT = {
    "deepseek-v2": 235741434880,
    "deepseek-v2-lite": 15706484224,
    "deepseek-v3": 671026404352,
    "deepseek-v3.2": 671877929216,
    "deepseek-v4-flash": 284325869015,
    "dots.llm1": 142774373888,
    "ernie-4.5-21b-a3b": 21825437888,
    "ernie-4.5-300b-a47b": 299484163264,
    "glm-4.5": 352797814784,
    "glm-5": 743911199232,
    "gpt-oss-120b": 116829156672,
    "gpt-oss-20b": 20914757184,
    "granite-3.0-3b-a800m": 3298793472,
    "hunyuan-a13b": 80393183232,
    "jamba-v0.1": 51570323328,
    "kimi-k2": 1026408209408,
    "kimi-linear-48b-a3b": 49133074464,
    "llama-4-maverick": 400711848960,
    "llama-4-scout": 107769861120,
    "mimo-v2-flash": 308778768832,
    "minimax-m2": 228689748992,
    "minimax-text-01": 456089655296,
    "mixtral-8x22b": 140630071296,
    "mixtral-8x7b": 46702792704,
    "moonlight-16b-a3b": 15960108544,
    "nemotron-3-nano-30b-a3b": 31577937344,
    "nemotron-3-super-120b-a12b": 120668687360,
    "nemotron-4-15b": 15628775424,
    "olmoe-1b-7b": 6919161856,
    "qwen1.5-moe-a2.7b": 14315784192,
    "qwen2-57b-a14b": 57408658944,
    "qwen3-235b-a22b": 235093634560,
    "qwen3-30b-a3b": 30532122624,
    "qwen3-next-80b-a3b": 79674391296,
    "qwen3.5-35b-a3b": 34660610688,
    # Published by the makers of the models.
    "llama2-7b": 6738415616,
    "llama2-13b": 13015864320,
    "llama2-70b": 68976648192,
    "llama3-8b": 8030261248,
    "llama3-70b": 70553706496,
    "llama3.1-405b": 405853388800,
    "llama3.2-1b": 1235814400,
    "llama3.2-3b": 3212749824,
    "qwen2.5-7b": 7615616512,
    "qwen2.5-72b": 72706203648,
    "mpt-7b": 6658859008,
    "mpt-13b": 12853954560,
    "mpt-30b": 29975214080,
    "mpt-70b": 64862437376,
    # No class to compare with.
    "longcat-flash": 560664958976,
    "arctic": 478584608768,
    "dbrx": 131596523520,
    "grok-1": 315684820992,
    "ling-lite-1.5": 16801974272,
    "ling-mini-2.0": 16255638528,
}

# Billions: total, active with all embeddings, active without the input embedding; None where one number is given.
ROUNDED = {
    "mixtral-8x7b": (46.70, 12.88, 12.75),
    "mixtral-8x22b": (140.63, 39.16, 38.96),
    "deepseek-v3": (671.03, 37.55, 36.63),
    "deepseek-v3.2": (671.88, 38.40, 37.48),
    "deepseek-v2": (235.74, 21.38, 20.85),
    "deepseek-v2-lite": (15.71, 2.66, 2.45),
    "kimi-k2": (1026.41, 32.86, 31.69),
    "kimi-linear-48b-a3b": (49.13, 3.49, 3.12),
    "qwen3-235b-a22b": (235.09, 22.19, 21.57),
    "qwen3-30b-a3b": (30.53, 3.35, 3.04),
    "qwen3-next-80b-a3b": (79.67, 3.87, 3.56),
    "qwen2-57b-a14b": (57.41, 14.25, 13.70),
    "gpt-oss-120b": (116.83, 5.71, 5.13),
    "gpt-oss-20b": (20.91, 4.19, 3.61),
    "glm-4.5": (352.80, 33.63, 32.86),
    "glm-4.5-air": (106.85, 13.42, 12.80),
    "llama-4-scout": (107.77, 17.17, 16.14),
    "llama-4-maverick": (400.71, 17.18, 16.15),
    "dbrx": (131.60, 36.47, 35.85),
    "olmoe-1b-7b": (6.92, 1.28, 1.18),
    "jamba-v0.1": (51.57, 12.11, 11.84),
    "phi-3.5-moe": (41.87, 6.64, 6.51),
    "arctic": (478.58, 17.32, 17.09),
    "grok-1": (315.68, 83.76, None),
    "minimax-text-01": (456.09, 48.40, 47.17),
    "minimax-m2": (228.69, 11.03, 10.42),
    "ernie-4.5-300b-a47b": (299.48, 47.93, 47.08),
    "ernie-4.5-21b-a3b": (21.83, 3.35, None),
    "hunyuan-a13b": (80.39, 12.75, None),
    "dots.llm1": (142.77, 14.02, 13.39),
    "longcat-flash": (560.66, 27.95, 27.15),
    "ling-1t": (999.71, 51.05, 49.77),
    "ling-mini-2.0": (16.26, 1.43, 1.11),
    "nemotron-3-nano-30b-a3b": (31.58, 3.58, 3.23),
    "nemotron-3-super-120b-a12b": (120.67, 12.77, 12.23),
    "gpt-1.7b": (1.65, 1.65, None),
    "gpt-145.6b": (145.62, 145.62, None),
    "gpt-529.6b": (529.60, 529.60, None),
    "gpt-1008b": (1008.04, 1008.04, None),
    "gpt-174.6b": (174.62, 174.62, None),
}

# The models of the published training runs that the planner is compared with, as their sources spell them; one more,
# Nemotron-3-Ultra, is missing for want of a configuration.
PUBLISHED_RUNS = """
    DeepSeek-V2-236B-4L-proxy DeepSeek-V3-671B DeepSeek-V4-Flash GPT-1008B GPT-145.6B GPT-174.6B GPT-175B GPT-18.4B
    GPT-1T
    GPT-3-175B GPT-3-20B GPT-39.1B GPT-529.6B GPT-530B GPT-5B GPT-7.5B GPT-OSS-120B Grok-1-314B Grok-1-314B-16L-proxy
    Grok-1-314B-2L-proxy Grok-1-314B-4L-proxy Grok-1-314B-8L-proxy Llama2-13B Llama2-70B Llama2-7B Llama3-70B
    Llama3-70B-12L-proxy Llama3-8B Llama3.1-405B Llama3.1-405B-21L-proxy Llama3.1-405B-30L-proxy Llama3.1-405B-42L-proxy
    Llama3.1-405B-4L-proxy Llama3.1-405B-62L-proxy Llama3.1-405B-7L-proxy Llama3.1-405B-8L-proxy Llama3.1-70B
    Llama3.1-8B
    MPT-13B MPT-30B MPT-70B MPT-7B Mixtral-8x22B Mixtral-8x22B-G8T8 Mixtral-8x7B Nemotron-22B Nemotron-3-Nano-30B-A3B
    Nemotron-3.5-Lightning-30B-A3B Nemotron-340B Nemotron-4-15B Nemotron-4-340B Nemotron-8B Qwen2.5-14B Qwen2.5-72B
    Qwen2.5-7B Qwen3-14B Qwen3-235B-A22B Qwen3-30B-A3B
""".split()

SPELLINGS = {
    "Llama 3 70B": "llama3-70b",
    "llama-3.1-70B": "llama3.1-70b",
    "DeepSeek V3": "deepseek-v3",
    "deepseek_v3": "deepseek-v3",
    "Qwen3-Next-80B-A3B": "qwen3-next-80b-a3b",
    "KIMI-K2": "kimi-k2",
    "Moonlight-16B": "moonlight-16b-a3b",
    "GLM-4.5-Air": "glm-4.5-air",
    "GPT-OSS-20B": "gpt-oss-20b",
    "Nemotron-3-Super": "nemotron-3-super-120b-a12b",
    "Nemotron-3-Nano": "nemotron-3-nano-30b-a3b",
    "Mixtral 8x7B": "mixtral-8x7b",
    "Llama3-8x70B": "llama3-8x70b",
    "GPT-1T": "gpt-1008b",
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_totals(name):
    assert parameter_count(load_model(name)).total == EXACT[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_totals_and_active_parameters(name):
    count = parameter_count(load_model(name))
    total, active, without_embedding = ROUNDED[name]
    assert count.total / 1e9 == pytest.approx(total, abs=0.0051)
    assert count.active / 1e9 == pytest.approx(active, abs=0.0051)
    if without_embedding is not None:
        assert count.active_without_embedding / 1e9 == pytest.approx(without_embedding, abs=0.0051)


@pytest.mark.parametrize("name", PUBLISHED_RUNS)
def test_models_of_published_runs(name):
    model = load_model(name)
    if name.endswith("L-proxy"):
        layers = int(name.removesuffix("L-proxy").rpartition("-")[2])
        assert len(model.layers) == layers
        assert model.name.endswith(f"-{layers}l-proxy")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling):
    assert load_model(spelling).name == SPELLINGS[spelling]


@pytest.mark.parametrize("name", model_names())
def test_catalog_files(name):
    path = MODELS / f"{name}.yaml"
    data, entry, model = yaml.safe_load(path.read_text()), catalog_model(name), load_model(name)
    assert (entry.name, model.name, name.lower()) == (name, name, name)
    # The second line alone must say what the whole file says.
    assert model_aliases()[name] == tuple(data["aliases"]) == entry.aliases
    assert entry.source and model.source == entry.source
    assert load_family(model.family) is not None, "a catalog model must belong to a known family"
    assert model.remarks == ()
    assert model.config == data["config"]
    assert all(len(line) <= 120 for line in path.read_text().splitlines()[2:])


def test_no_spelling_means_two_models():
    spellings = [s for name, aliases in model_aliases().items() for s in {fold(name), *map(fold, aliases)}]
    assert len(spellings) == len(set(spellings))


def fold(name):
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def test_names_are_sorted_and_complete():
    assert model_names() == sorted(model_names())
    assert {"deepseek-v3", "mixtral-8x7b", "llama3-8b"} <= set(model_names())
    assert set(model_aliases()) == set(model_names())


def test_real_context_lengths():
    expected = {"deepseek-v3": 163840, "kimi-k2": 131072, "qwen3-30b-a3b": 40960, "llama3-70b": 8192}
    assert {name: load_model(name).max_positions for name in expected} == expected


@pytest.mark.parametrize("name", ["DeepSeek-V3-4L-proxy", "deepseek-v3-4l-proxy"])
def test_proxy_of_any_spelling(name):
    assert load_model(name).name == "deepseek-v3-4l-proxy"
    assert load_model(name).layers == load_model("deepseek-v3").layers[:4]


def test_proxy_with_too_many_layers():
    with pytest.raises(ModelError, match="61 layers, cannot be cut to 99"):
        load_model("DeepSeek-V3-99L-proxy")


def test_unknown_name_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown model 'deepsek-v3'.*did you mean 'deepseek-v3'"):
        load_model("deepsek-v3")
    with pytest.raises(UnknownNameError, match="unknown model 'mixtrl-8x7b'"):
        load_model("mixtrl-8x7b-2L-proxy")


@pytest.fixture
def config(tmp_path):
    data = dict(catalog_model("mixtral-8x7b").config) | {"time_step_limit": [0.0, float("inf")]}
    path = tmp_path / "my-model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(data))
    return path


def test_a_config_json_and_the_directory_that_holds_it(config, monkeypatch):
    assert "Infinity" in config.read_text()
    model = load_model(str(config))
    assert model.layers == load_model("mixtral-8x7b").layers
    assert (model.name, model.source) == ("my-model", str(config))
    assert load_model(str(config.parent)) == model
    monkeypatch.chdir(config.parent)
    assert load_model("config.json").name == "my-model"
    monkeypatch.chdir(config.parent.parent)
    assert load_model("my-model").name == "my-model"


def test_yaml_with_published_keys_or_in_the_catalog_form(tmp_path):
    data = dict(catalog_model("gpt-oss-20b").config)
    plain, entry = tmp_path / "plain.yaml", tmp_path / "entry.yaml"
    plain.write_text(yaml.safe_dump(data))
    entry.write_text(yaml.safe_dump({"name": "mine", "config": data}))
    assert load_model(str(plain)).layers == load_model(str(entry)).layers == load_model("gpt-oss-20b").layers
    assert (load_model(str(plain)).name, load_model(str(entry)).name) == ("plain", "mine")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", '{"hidden_size": 1,\n "x": }', "line 2: not valid JSON"),
        ("a.json", "[1, 2]", "expected the keys of a config.json, found list"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.yaml", "a: [1\nb: 2\n", "line 2: not valid YAML"),
        ("a.yaml", "just words", "expected the keys of a config.json, found str"),
        ("a.yaml", "config: {hidden_size: 1}\nnmae: x\n", "unknown key 'nmae'.*did you mean 'name'"),
    ],
)
def test_malformed_files(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SchemaError, match=message):
        load_model(str(path))


def test_missing_files():
    with pytest.raises(FileError, match="'no/such.json' does not exist"):
        load_model("no/such.json")
    with pytest.raises(FileError, match="the catalog knows it as 'deepseek-v3'"):
        load_model("deepseek-ai/DeepSeek-V3")


def test_a_file_without_a_size_is_refused_by_name(tmp_path):
    path = tmp_path / "odd.json"
    path.write_text('{"model_type": "brand_new", "num_hidden_layers": 2}')
    with pytest.raises(ModelError, match="model 'odd': no heads found .looked for"):
        load_model(str(path))


def test_names_are_read_without_heavy_imports():
    code = "import sys, moeplan.costmodels.model_catalog as c; c.load_model('llama3-8b'); print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
