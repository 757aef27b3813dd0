from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from executor.runtime.protocol import UnknownVariant
from executor.runtime.torch_runtime import GeneratingModel, TorchRuntime
from plans.errors import InvalidInput
from tests.executor.runtime.contract import RuntimeContract


def save_bert(folder: Path) -> BertForSequenceClassification:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24,
    )  # fmt: skip
    module = BertForSequenceClassification(config).eval()
    module.save_pretrained(folder)
    return module


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of one good model, ``tiny``."""
    root = tmp_path / "models"
    root.mkdir()
    save_bert(root / "tiny")
    return root


def refused(models: Path, name: str = "tiny") -> str:
    with pytest.raises(InvalidInput) as caught:
        TorchRuntime(model_dir=models).load(name, 1)
    return str(caught.value)


class TestLocalModel(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls, tmp_path_factory: pytest.TempPathFactory) -> TorchRuntime:
        root = tmp_path_factory.mktemp("models")
        save_bert(root / "tiny")
        torch.manual_seed(3)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ResNetForImageClassification(config).save_pretrained(root / "little-resnet")
        return TorchRuntime(model_dir=root)

    @pytest.fixture(scope="class", params=["tiny", "little-resnet"])
    @classmethod
    def variant(cls, request: pytest.FixtureRequest) -> str:
        return str(request.param)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="a folder of models"):
        TorchRuntime(model_dir=tmp_path / "nowhere")


def test_weights_come_from_the_file(models: Path) -> None:
    model = TorchRuntime(model_dir=models).load("tiny", 2)
    inputs = model.example(2)
    with torch.inference_mode():
        expected = save_bert(models / "again")(input_ids=torch.from_numpy(inputs["input_ids"])).logits.numpy()
    assert model.run(inputs)["logits"] == pytest.approx(expected, abs=1e-6)
    assert model.inputs[0].shape == (24,)


def test_a_local_model_goes_before_the_registry(models: Path) -> None:
    (models / "tiny").rename(models / "resnet-18")
    assert TorchRuntime(model_dir=models).load("resnet-18", 1).inputs[0].name == "input_ids"


def test_pickled_weights_are_never_read(models: Path) -> None:
    weights = models / "tiny" / "model.safetensors"
    torch.save(load_file(weights), models / "tiny" / "pytorch_model.bin")
    weights.unlink()
    assert "weights as *.safetensors" in refused(models)


def test_truncated_weights_are_refused(models: Path) -> None:
    weights = models / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "safetensors weights" in refused(models)


@pytest.mark.parametrize("change", ["missing", "unknown", "misshapen"])
def test_weights_of_another_architecture_are_refused(models: Path, change: str) -> None:
    path = models / "tiny" / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["classifier.weight"]
    elif change == "unknown":
        tensors["stranger"] = torch.zeros(2)
    else:
        tensors["classifier.weight"] = torch.zeros(7, 16)
    save_file(tensors, path, metadata={"format": "pt"})
    assert refused(models)


def test_weights_may_be_spread_over_files(models: Path) -> None:
    path = models / "tiny" / "model.safetensors"
    whole = TorchRuntime(model_dir=models).load("tiny", 1)
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, models / "tiny" / "a.safetensors")
    save_file({name: tensors[name] for name in names[5:]}, models / "tiny" / "b.safetensors")
    spread = TorchRuntime(model_dir=models).load("tiny", 1)
    assert np.array_equal(spread.run(spread.example(1))["logits"], whole.run(whole.example(1))["logits"])


def test_a_tensor_in_two_files_is_refused(models: Path) -> None:
    save_file({"classifier.weight": torch.zeros(2, 16)}, models / "tiny" / "zz.safetensors")
    assert "found classifier.weight again" in refused(models)


def change_config(models: Path, **fields: object) -> None:
    path = models / "tiny" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "stated", ["BertForNothing", "LlamaForCausalLM", "PreTrainedModel", "AutoModel", "pipeline", "../bert", "", None]
)
def test_a_class_that_is_none_of_transformers_for_the_configuration_is_refused(
    models: Path, stated: str | None
) -> None:
    change_config(models, architectures=[stated] if stated is not None else None)
    assert f"architectures: found {stated or ''!r}, expected a model class of transformers" in refused(models)


def test_weights_of_another_head_are_refused(models: Path) -> None:
    change_config(models, architectures=["BertForMaskedLM"])
    assert "exactly the weights of the architecture in config.json" in refused(models)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "encoder": lambda: BertModel(BertConfig(vocab_size=60, **SMALL)),
    "questions": lambda: BertForQuestionAnswering(BertConfig(vocab_size=60, **SMALL)),
    "gpt": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "pictures": lambda: ViTModel(ViTConfig(image_size=32, **SMALL)),
    "sound": lambda: Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=30, conv_dim=(8,) * 7, **SMALL)),
    "whole-t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    ),
}
"""Models with heads of other kinds, by a name."""


class TestOtherHeads(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls, tmp_path_factory: pytest.TempPathFactory) -> TorchRuntime:
        root = tmp_path_factory.mktemp("models")
        for name, build in OTHERS.items():
            build().save_pretrained(root / name)
        return TorchRuntime(model_dir=root)

    @pytest.fixture(scope="class", params=[name for name in OTHERS if name != "whole-t5"])
    @classmethod
    def variant(cls, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_every_tensor_with_a_row_for_each_item_is_an_output(self, runtime: TorchRuntime) -> None:
        shapes = {
            name: {spec.name: spec.shape for spec in runtime.load(name, 1).outputs}
            for name in ("questions", "pictures")
        }
        assert shapes["questions"] == {"start_logits": (128,), "end_logits": (128,)}
        assert shapes["pictures"] == {"last_hidden_state": (5, 32), "pooler_output": (32,)}

    def test_a_causal_model_answers_with_the_first_token_of_its_answer(self, runtime: TorchRuntime) -> None:
        assert [spec.shape for spec in runtime.load("gpt", 1).outputs] == [(1, 60)]

    def test_a_model_that_needs_more_than_one_input_is_refused(self, runtime: TorchRuntime) -> None:
        with pytest.raises(InvalidInput, match="a model that runs on input_ids alone"):
            runtime.load("whole-t5", 1)


def test_an_unknown_model_type_is_refused(models: Path) -> None:
    change_config(models, model_type="martian")
    assert "a configuration that transformers knows" in refused(models)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a":' * 100_000, "5"])
def test_a_configuration_that_is_no_json_is_refused(models: Path, text: str) -> None:
    (models / "tiny" / "config.json").write_text(text)
    assert "a configuration that transformers knows" in refused(models)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"architectures": [5]},
        {"architectures": 5},
        {"num_attention_heads": 0},
        {"dtype": "evil"},
        {"pad_token_id": 1000},
        {"quantization_config": 5},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 10**30},
        {"model_type": "upernet", "architectures": ["UperNetForSemanticSegmentation"], "backbone": "some/where"},
        {
            "model_type": "detr",
            "architectures": ["DetrForObjectDetection"],
            "backbone": "resnet50",
            "use_timm_backbone": True,
        },
    ],
    ids=[
        "a field's type",
        "a class's type",
        "no list of classes",
        "no heads",
        "no such dtype",
        "a token past the last",
        "a quantization's type",
        "too large for torch",
        "a backbone elsewhere",
        "a backbone of timm",
    ],
)
def test_a_configuration_that_cannot_be_followed_here_is_refused_and_nobody_else_asked(
    models: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    asked: list[object] = []

    def look_up(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror("no network in a test")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    change_config(models, **change)
    assert "config.json" in refused(models)
    assert asked == []


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("attn_implementation", "org/kernel", "org/kernel"),
        ("attn_implementation", {"": "org/kernel@v1:attention"}, "org/kernel@v1:attention"),
        ("attn_implementation", {"text_config": "org/kernel"}, "org/kernel"),
        ("attn_implementation", "flash_attention_2", "flash_attention_2"),
        ("attn_implementation", 5, 5),
        ("experts_implementation", "sonicmoe", "sonicmoe"),
    ],
)
def test_attention_and_experts_that_others_would_compute_are_refused(
    models: Path, field: str, value: object, found: object
) -> None:
    change_config(models, model_type="clip", architectures=["CLIPModel"], **{field: value})
    assert f"config.json: {field}: found {found!r}, expected one of eager, " in refused(models)


@pytest.mark.parametrize("value", ["eager", "sdpa", None])
def test_attention_of_transformers_itself_is_chosen_by_the_configuration(models: Path, value: str | None) -> None:
    change_config(models, attn_implementation=value)
    assert TorchRuntime(model_dir=models).load("tiny", 1).outputs


def test_a_model_that_would_answer_without_names_answers_with_them(models: Path) -> None:
    change_config(models, return_dict=False)
    model = TorchRuntime(model_dir=models).load("tiny", 1)
    assert list(model.run(model.example(1))) == ["logits"]


def test_a_length_that_no_input_has_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=60, num_key_value_heads=2, max_position_embeddings=-3, **SMALL)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    assert "config.json: found shape (-3,) has a negative length" in refused(tmp_path)


def test_code_in_the_folder_is_never_run(models: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (models / "tiny" / "custom.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass C: pass\n")
    change_config(models, auto_map={"AutoConfig": "custom.C", "AutoModelForSequenceClassification": "custom.C"})
    with contextlib.suppress(InvalidInput):
        TorchRuntime(model_dir=models).load("tiny", 1)
    assert not ran.exists()


def test_a_link_out_of_the_folder_is_no_model(models: Path, tmp_path: Path) -> None:
    save_bert(tmp_path / "outside")
    (models / "linked").symlink_to(tmp_path / "outside")
    assert "linked" not in TorchRuntime(model_dir=models).names()
    with pytest.raises(UnknownVariant):
        TorchRuntime(model_dir=models).load("linked", 1)


def test_weights_that_are_a_link_out_of_the_folder_are_refused(models: Path, tmp_path: Path) -> None:
    weights = models / "tiny" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "expected a file inside" in refused(models)


def test_a_shard_index_cannot_lead_out_of_the_folder(models: Path, tmp_path: Path) -> None:
    path = models / "tiny" / "model.safetensors"
    tensors = load_file(path)
    path.rename(tmp_path / "outside.safetensors")
    save_file({"decoy": torch.zeros(1)}, models / "tiny" / "decoy.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../../outside.safetensors")}
    (models / "tiny" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(models)


def test_folders_that_are_no_models_are_not_listed(models: Path) -> None:
    (models / "notes").mkdir()
    (models / ".hidden").mkdir()
    (models / ".hidden" / "config.json").write_text("{}")
    (models / "file").write_text("")
    listed = set(TorchRuntime(model_dir=models).names())
    assert "tiny" in listed
    assert not listed & {"notes", ".hidden", "file"}


def test_examples_stay_inside_a_small_vocabulary(models: Path) -> None:
    model = TorchRuntime(model_dir=models).load("tiny", 64)
    assert int(np.max(model.example(64)["input_ids"])) < 50


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_folder_generates_as_transformers_does(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    module.save_pretrained(tmp_path / "models" / "chat")
    model = TorchRuntime(model_dir=tmp_path / "models").load("chat", 2)
    assert isinstance(model, GeneratingModel)
    assert [spec.shape for spec in model.inputs + model.outputs] == [(64,), (1, 60)]
    engine = model.engine(kv_tokens=40, max_batch=2)
    engine.add([3, 1, 4, 1, 5], 9)
    finished = ()
    while not engine.is_idle:
        finished = engine.step().finished
    with torch.inference_mode():
        expected = module.generate(
            torch.tensor([[3, 1, 4, 1, 5]]), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert finished[0].tokens == tuple(expected[0, 5:].tolist())
