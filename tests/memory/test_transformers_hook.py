"""Noise in training scripts: while transformers loads a model, and as its Trainer begins."""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import noisytune_cli
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.errors import InputInvalid, NoisytuneWarning, UsageError
from noisytune_cli.records import NoiseSpec

transformers = pytest.importorskip("transformers")

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "intermediate_size": 8,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model as people publish it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "bert-tiny"
    transformers.BertForMaskedLM(transformers.BertConfig(**SIZE)).save_pretrained(folder)
    return folder


def parameters(model: Any) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def headed(folder: Path, **options: Any) -> Any:
    """Load with a fresh head, the same one each time."""
    torch.manual_seed(1)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **options)


def test_a_model_is_loaded_as_from_the_noisy_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    perturb(Request(str(checkpoint), NoiseSpec(lam=0.3, seed=7)), str(tmp_path / "noisy"))
    expected = parameters(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "noisy"))
    with noisytune_cli.noisy_from_pretrained(lam=0.3, seed=7) as records:
        model = transformers.AutoModelForMaskedLM.from_pretrained(checkpoint)
    assert same(parameters(model), expected)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    (record,) = records
    assert record.source.id == "bert-tiny"
    assert record.noise == NoiseSpec(lam=0.3, seed=7)
    clean = transformers.AutoModelForMaskedLM.from_pretrained(checkpoint)
    assert not same(parameters(clean), expected)


def test_a_folder_that_was_noised_is_refused_as_on_disk(checkpoint: Path, tmp_path: Path) -> None:
    noisy = perturb(Request(str(checkpoint), NoiseSpec()), str(tmp_path / "noisy")).output
    load = transformers.AutoModelForMaskedLM.from_pretrained
    with noisytune_cli.noisy_from_pretrained() as records:
        for place, more in ((noisy, {}), (str(tmp_path), {"subfolder": "noisy"})):
            with pytest.raises(InputInvalid, match=r"noised before.*or pass again=True to add noise"):
                load(place, **more)
        assert not records
        load(checkpoint)
    with noisytune_cli.noisy_from_pretrained(seed=1, again=True) as records:
        model = load(noisy)
    assert len(records) == 1
    args = SimpleNamespace(output_dir=tmp_path / "run", resume_from_checkpoint=None)
    state = SimpleNamespace(global_step=0, is_world_process_zero=False)
    with pytest.warns(NoisytuneWarning, match="this noise comes on top"):
        noisytune_cli.NoisyTuneCallback(seed=2).on_train_begin(args, state, None, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noisytune_cli.NoisyTuneCallback(seed=3, again=True).on_train_begin(args, state, None, model=model)
    (tmp_path / "pipeline").mkdir()
    part = (tmp_path / "noisy").rename(tmp_path / "pipeline" / "encoder")
    manifest = (part / "noisytune.json").rename(tmp_path / "pipeline" / "noisytune.json")
    with noisytune_cli.noisy_from_pretrained():
        load(part)  # that above is of other files
        manifest.write_text(
            manifest.read_text().replace('"model.safetensors"', '"encoder/model.safetensors"')
        )
        with pytest.raises(InputInvalid, match="noised before"):
            load(part)


def test_a_fresh_head_gets_no_noise_unless_told(checkpoint: Path, tmp_path: Path) -> None:
    clean = parameters(headed(checkpoint))
    perturb(Request(str(checkpoint), NoiseSpec()), str(tmp_path / "noisy"))
    expected = parameters(headed(tmp_path / "noisy"))
    with noisytune_cli.noisy_from_pretrained() as records:
        model, info = headed(checkpoint, output_loading_info=True)
    assert same(parameters(model), expected)
    assert "classifier.weight" in info["missing_keys"]
    fresh = {r.step.tensor.name for r in records[0].receipts if r.reason == "excluded"}
    assert fresh == {
        "classifier.weight",
        "classifier.bias",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    with noisytune_cli.noisy_from_pretrained(fresh="perturb"):
        model = headed(checkpoint)
    assert not torch.equal(model.classifier.weight, clean["classifier.weight"])


def test_a_parameter_of_another_shape_is_fresh(checkpoint: Path) -> None:
    with noisytune_cli.noisy_from_pretrained(fresh_names="encoder.*") as records:
        transformers.BertModel.from_pretrained(checkpoint, vocab_size=60, ignore_mismatched_sizes=True)
    (record,) = records
    reasons = {r.step.tensor.name: r.reason for r in record.receipts}
    assert reasons["bert.embeddings.word_embeddings.weight"] == "excluded"
    assert reasons["bert.embeddings.position_embeddings.weight"] is None
    assert {reason for name, reason in reasons.items() if "encoder" in name and "dense.weight" in name} == {
        "excluded"
    }


def test_what_a_model_loads_while_it_is_loaded_gets_no_noise_of_its_own(checkpoint: Path) -> None:
    parts = []

    class Outer(transformers.BertForMaskedLM):  # type: ignore[misc,name-defined]
        def eval(self) -> Any:  # loading ends with this call
            parts.append(transformers.BertModel.from_pretrained(checkpoint, add_pooling_layer=False))
            return super().eval()

    with noisytune_cli.noisy_from_pretrained() as records:
        Outer.from_pretrained(checkpoint)
    assert len(records) == 1
    clean = transformers.BertModel.from_pretrained(checkpoint, add_pooling_layer=False)
    assert same(parameters(parts[0]), parameters(clean))


def test_a_process_that_gets_its_weights_from_another_adds_no_noise(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Empty(transformers.BertModel):  # type: ignore[misc,name-defined]
        def eval(self) -> Any:
            return super().eval().to("meta")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        with noisytune_cli.noisy_from_pretrained() as records:
            if rank:
                Empty.from_pretrained(checkpoint)
            else:
                with pytest.raises(InputInvalid, match="meta device"):
                    Empty.from_pretrained(checkpoint)
        assert records == []


def test_the_patch_ends_with_the_block_and_does_not_nest(checkpoint: Path) -> None:
    original = transformers.PreTrainedModel.__dict__["from_pretrained"]
    with (
        pytest.raises(UsageError, match="inside another"),
        noisytune_cli.noisy_from_pretrained(),
        noisytune_cli.noisy_from_pretrained(),
    ):
        raise AssertionError("it nests")
    assert transformers.PreTrainedModel.__dict__["from_pretrained"] is original
    with (
        pytest.raises(UsageError, match="matches nothing"),
        noisytune_cli.noisy_from_pretrained(exclude="none"),
    ):
        transformers.BertModel.from_pretrained(checkpoint)
    assert transformers.PreTrainedModel.__dict__["from_pretrained"] is original


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, whose names have no prefix."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "bert-base"
    transformers.BertModel(transformers.BertConfig(**SIZE)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fresh_names": None}, "fresh_names=None"),
        ({"fresh_names": 5}, "fresh_names=5"),
        ({"lam": "strong"}, "lam='strong'"),
        ({"frozen": "keep"}, "frozen='keep'"),
        ({"threads": 0}, "threads=0"),
        ({"names": 5}, "names=5"),
        ({"config": 5}, "config=5"),
        ({"manifest": b"x"}, "manifest=b'x'"),
        ({"lambda_": 0.1}, "lambda_=.*no such option.*lam, seed"),
        ({"model": None}, "model=.*no such option"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_before_anything_is_loaded(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words), noisytune_cli.noisy_from_pretrained(**options):
        raise AssertionError("the block was entered")
    with pytest.raises(UsageError, match=words):
        noisytune_cli.NoisyTuneCallback(**options)


def test_every_model_gets_all_of_an_iterator(base: Path) -> None:
    with noisytune_cli.noisy_from_pretrained(exclude=iter(["*.bias"])) as records:
        for _ in range(2):
            transformers.BertModel.from_pretrained(base)
    assert records[0] == records[1]
    assert {r.action for r in records[1].receipts if r.step.tensor.name.endswith(".bias")} == {"copy"}


def test_what_others_load_meanwhile_gets_no_noise(base: Path) -> None:
    def load() -> Any:
        return parameters(transformers.BertModel.from_pretrained(base))

    async def block(entered: asyncio.Event, done: asyncio.Event) -> Any:
        with noisytune_cli.noisy_from_pretrained() as records, ThreadPoolExecutor(1) as pool:
            entered.set()
            await done.wait()
            return load(), await asyncio.to_thread(load), pool.submit(load).result(), len(records)

    async def both() -> Any:
        entered, done = asyncio.Event(), asyncio.Event()
        noisy = asyncio.create_task(block(entered, done))
        await entered.wait()
        found = load()
        done.set()
        return found, *(await noisy)

    clean = load()
    other_task, own, in_its_context, thread, records = asyncio.run(both())
    assert same(other_task, clean)
    assert same(thread, clean)
    assert not same(own, clean)
    assert same(in_its_context, own)
    assert records == 2
    assert same(load(), clean)


def disk_and_memory(folder: Path, load: Any, out: Path, **options: Any) -> tuple[Any, Any, Any]:
    """Load a noisy checkpoint, and the clean one with noise; and the record."""
    perturb(Request(str(folder), NoiseSpec()), str(out))
    torch.manual_seed(1)
    on_disk = load(out)
    with noisytune_cli.noisy_from_pretrained(**options) as records:
        torch.manual_seed(1)
        in_memory = load(folder)
    return parameters(on_disk), parameters(in_memory), records[0]


def test_a_base_model_under_a_head_has_the_noise_of_its_checkpoint(base: Path, tmp_path: Path) -> None:
    on_disk, in_memory, record = disk_and_memory(base, headed, tmp_path / "out")
    assert same(on_disk, in_memory)
    names = {r.step.tensor.name: r for r in record.receipts}
    assert names["encoder.layer.0.output.dense.weight"].action == "perturb"
    assert names["classifier.weight"].reason == "excluded"
    assert record.warnings == ()


def test_a_headed_checkpoint_in_a_base_model_has_its_noise(checkpoint: Path, tmp_path: Path) -> None:
    def load(folder: Path) -> Any:
        return transformers.BertModel.from_pretrained(folder)

    on_disk, in_memory, record = disk_and_memory(checkpoint, load, tmp_path / "out")
    assert same(on_disk, in_memory)
    assert "bert.embeddings.word_embeddings.weight" in {r.step.stream for r in record.receipts}


def test_keys_that_the_loader_renames_keep_their_names_of_the_checkpoint(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "old")
    state = load_file(base / "model.safetensors")
    spelt = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, tensor in state.items():
        end = ".".join(name.split(".")[-2:])
        old[name.removesuffix(end) + spelt.get(end, end)] = tensor + torch.randn(tensor.shape)
    assert old.keys() != state.keys()
    save_file(old, tmp_path / "old/model.safetensors", {"format": "pt"})
    on_disk, in_memory, record = disk_and_memory(tmp_path / "old", headed, tmp_path / "out")
    assert same(on_disk, in_memory)
    assert "embeddings.LayerNorm.gamma" in {r.step.stream for r in record.receipts if r.action == "perturb"}


def test_what_is_renamed_gets_its_noise_and_what_is_fused_is_warned_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZE | {"num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size": 8}
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "in")
    assert any("experts.0.w1" in name for name in load_file(tmp_path / "in/model.safetensors"))
    perturb(Request(str(tmp_path / "in"), NoiseSpec()), str(tmp_path / "out"))
    on_disk = parameters(transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out"))
    with (
        noisytune_cli.noisy_from_pretrained() as records,
        pytest.warns(UserWarning, match="made of other tensors of the checkpoint") as warned,
    ):
        in_memory = parameters(transformers.MixtralForCausalLM.from_pretrained(tmp_path / "in"))
    assert len(warned) == len(records[0].warnings) == 1
    others = {name for name in on_disk if not torch.equal(on_disk[name], in_memory[name])}
    assert others == {name for name in on_disk if ".experts." in name}
    gate = next(name for name in on_disk if name.endswith("gate.weight"))
    assert gate not in others


def test_what_the_model_computes_itself_is_fresh(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=8,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    transformers.MarianMTModel(config).save_pretrained(tmp_path / "in")
    assert not any("embed_positions" in name for name in load_file(tmp_path / "in/model.safetensors"))
    perturb(Request(str(tmp_path / "in"), NoiseSpec()), str(tmp_path / "out"))
    on_disk = parameters(transformers.MarianMTModel.from_pretrained(tmp_path / "out"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with noisytune_cli.noisy_from_pretrained() as records:
            in_memory = parameters(transformers.MarianMTModel.from_pretrained(tmp_path / "in"))
    assert same(in_memory, on_disk)
    left = {r.step.tensor.name for r in records[0].receipts if r.reason == "excluded"}
    assert left == {name for name in in_memory if "embed_positions" in name}


def test_a_block_in_which_nothing_is_loaded_says_so(checkpoint: Path) -> None:
    with pytest.warns(NoisytuneWarning, match="no model got noise"), noisytune_cli.noisy_from_pretrained():
        ThreadPoolExecutor(1).submit(transformers.BertModel.from_pretrained, checkpoint).result()
    with pytest.raises(ZeroDivisionError), noisytune_cli.noisy_from_pretrained():
        raise ZeroDivisionError  # what went wrong is enough to say


def test_names_that_are_given_count(base: Path) -> None:
    with noisytune_cli.noisy_from_pretrained(names="encoder") as records:
        transformers.BertModel.from_pretrained(base)
    assert "layer.0.output.dense.weight" in {r.step.tensor.name for r in records[0].receipts}


def test_a_model_with_adapters_has_the_noise_of_its_base(checkpoint: Path) -> None:
    peft = pytest.importorskip("peft")

    def load() -> Any:
        return transformers.AutoModelForMaskedLM.from_pretrained(checkpoint)

    expected = load()
    record = noisytune_cli.perturb_(expected)
    noisy = parameters(expected)
    for config in (
        peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["dense"], use_dora=True),
        peft.LoHaConfig(r=2, target_modules=["query"]),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(load(), config)
        before = parameters(model)
        found = noisytune_cli.perturb_(model)
        names = {r.step.tensor.name: r.std for r in found.receipts}
        assert names == {r.step.tensor.name: r.std for r in record.receipts}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        after = parameters(model)
        assert trained
        assert all(torch.equal(before[name], after[name]) for name in trained)
        kept = [value for name, value in after.items() if name not in trained]
        assert all(any(torch.equal(value, own) for own in noisy.values()) for value in kept)


class Training:
    """What the Trainer worker to a callback as training begins."""

    def __init__(self, folder: Path, *, step: int = 0, main: bool = True, **arguments: Any) -> None:
        defaults = {"output_dir": str(folder / "out"), "deepspeed": None, "resume_from_checkpoint": None}
        self.args = SimpleNamespace(**defaults | arguments)
        self.state = transformers.TrainerState(global_step=step, is_world_process_zero=main)

    def begin(self, callback: Any, model: Any) -> None:
        callback.on_train_begin(self.args, self.state, transformers.TrainerControl(), model=model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's
def test_a_model_that_is_loaded_with_its_adapter_has_the_noise_of_its_base(
    base: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    plain = transformers.AutoModelForMaskedLM.from_pretrained(base)
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["query"]))
    adapted.save_pretrained(tmp_path / "adapter")
    perturb(Request(str(base), NoiseSpec()), str(tmp_path / "noisy"))
    expected = parameters(transformers.BertModel.from_pretrained(tmp_path / "noisy", add_pooling_layer=False))
    with noisytune_cli.noisy_from_pretrained():
        model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "adapter")
    found = {name.replace(".base_layer", ""): value for name, value in parameters(model.bert).items()}
    assert same({name: found[name] for name in expected}, expected)


def test_the_callback_perturbs_a_model_once_and_writes_the_record(tmp_path: Path) -> None:
    model, expected = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    clean = parameters(model)
    expected.load_state_dict(clean)
    record = noisytune_cli.perturb_(expected, seed=3)
    callback = noisytune_cli.NoisyTuneCallback(seed=3)
    for _ in range(2):
        Training(tmp_path).begin(callback, model)
        assert same(parameters(model), parameters(expected))
    assert callback.manifest == record
    written = json.loads((tmp_path / "out" / "noisytune-training.json").read_text())
    assert written["noise"]["seed"] == "3"
    assert [t["std"] for t in written["tensors"]] == [r.std for r in record.receipts]
    assert not any("digest" in tensor for tensor in written["tensors"])
    repeated = torch.nn.Linear(4, 4)
    repeated.load_state_dict(clean)
    noisytune_cli.perturb_(repeated, manifest=tmp_path / "out" / "noisytune-training.json")
    assert same(parameters(repeated), parameters(expected))
    another = torch.nn.Linear(4, 4)
    before = parameters(another)
    Training(tmp_path).begin(callback, another)
    assert not same(parameters(another), before)


def test_a_model_that_is_reset_has_no_noise_until_a_new_callback(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    clean = {name: values.clone() for name, values in model.state_dict().items()}
    callback = noisytune_cli.NoisyTuneCallback(seed=3)
    Training(tmp_path).begin(callback, model)
    noisy = parameters(model)
    model.load_state_dict(clean)
    Training(tmp_path).begin(callback, model)
    assert same(parameters(model), clean)
    Training(tmp_path).begin(noisytune_cli.NoisyTuneCallback(seed=3), model)
    assert same(parameters(model), noisy)


def test_a_callback_gives_each_model_all_of_an_iterator(tmp_path: Path) -> None:
    callback = noisytune_cli.NoisyTuneCallback(exclude=iter(["bias"]))
    for _ in range(2):
        model = torch.nn.Linear(4, 4)
        bias = model.bias.detach().clone()
        Training(tmp_path).begin(callback, model)
        assert torch.equal(model.bias, bias)


def test_a_callback_can_be_pickled(tmp_path: Path) -> None:
    callback = noisytune_cli.NoisyTuneCallback(lam=0.3, seed=3)
    model, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    other.load_state_dict(model.state_dict())
    Training(tmp_path).begin(callback, model)
    copied = pickle.loads(pickle.dumps(callback))
    assert (copied.options, copied.manifest) == (callback.options, callback.manifest)
    for _ in range(2):
        Training(tmp_path).begin(copied, other)
        assert same(parameters(other), parameters(model))


@pytest.mark.parametrize("step", [0, 5])
def test_the_callback_leaves_a_resumed_model_alone(step: int, tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    before = parameters(model)
    training = Training(tmp_path, step=step, resume_from_checkpoint="checkpoint-5")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.begin(noisytune_cli.NoisyTuneCallback(), model)
    assert ["no noise" in str(warning.message) for warning in caught] == [True] * (step == 0)
    assert same(parameters(model), before)
    assert not (tmp_path / "out").exists()


def test_only_one_process_writes_the_record_and_deepspeed_is_refused(tmp_path: Path) -> None:
    callback = noisytune_cli.NoisyTuneCallback()
    Training(tmp_path, main=False).begin(callback, torch.nn.Linear(4, 4))
    assert callback.manifest is not None
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="DeepSpeed"):
        Training(tmp_path, deepspeed="zero3.json").begin(callback, torch.nn.Linear(4, 4))
    with pytest.raises(UsageError, match="DeepSpeed"):  # as `accelerate launch` sets it
        Training(tmp_path, deepspeed_plugin=object()).begin(callback, torch.nn.Linear(4, 4))


def test_a_trainer_runs_the_callback(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: Any) -> dict[str, Any]:
            return {"loss": self.linear(x).square().mean()}

    torch.manual_seed(0)
    model, data = Toy(), [{"x": torch.randn(4)} for _ in range(4)]
    expected = Toy()
    expected.load_state_dict(model.state_dict())
    noisytune_cli.perturb_(expected)
    callback = noisytune_cli.NoisyTuneCallback()
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
    }
    settings |= {"learning_rate": 0.0, "disable_tqdm": True, "per_device_train_batch_size": 2}

    def trainer() -> Any:
        arguments = transformers.TrainingArguments(**settings)
        return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])

    trainer().train()
    assert same(parameters(model), parameters(expected))
    assert (tmp_path / "noisytune-training.json").is_file()
    callback = noisytune_cli.NoisyTuneCallback()
    settings["max_steps"] = 3
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(parameters(model), parameters(expected))
    assert callback.manifest is None
