"""Models of transformers with triflash as people use them: generation, training, compilation, GPUs, the examples."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import BY_NAME, VOCABULARY, B, L, Seen, inputs, made, ours, results, same, spied

pytest.importorskip("transformers")
import transformers

import triflash
from triflash.integrations import transformers as adapter

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def registered() -> None:
    adapter.register()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    return spied(monkeypatch)


# Caches and generation, token for token.


def generated(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    return model.eval().generate(**batch, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, do_sample=False, **options)


def both(name: str, side: str = "left") -> tuple[Any, Any, dict[str, Tensor]]:
    """The model under its reference, ours, and what to generate from."""
    family = BY_NAME[name]
    model, batch = made(family, family.reference), inputs(family.kind, side)
    batch.pop("labels")
    return model, ours(family, model), batch


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma-3", "gpt-oss", "Llama-4", "GPT-2", "T5", "Whisper", "BLOOM", "MPT", "Falcon"])
def test_generate(name: str, cache: str, calls: list[Seen]) -> None:
    theirs, mine, batch = both(name)
    options: dict[str, Any] = {"use_cache": cache != "none"} | ({"cache_implementation": cache} if cache == "static" else {})
    if cache == "static" and name in ("MPT", "BLOOM", "Falcon") and not getattr(theirs, "_can_compile_fullgraph", False):
        pytest.skip("the model has no static caches")
    want = generated(theirs, batch, **options)
    calls.clear()
    assert torch.equal(generated(mine, batch, **options), want)
    decoding = [call for call in calls if call.q.shape[1] == 1 and not call.packed]
    assert calls and (decoding or cache == "none")
    if cache == "static" and name in ("Llama", "Mistral", "Gemma-3", "gpt-oss"):  # what is left is a row of keys
        assert all(call.lean for call in calls if call.q.shape[1] > 1)
    if name not in ("BLOOM", "MPT", "Falcon"):  # their own attention calls triflash's
        assert all(call.cached for call in decoding if call.k.shape[1] > 1)
    if cache == "dynamic" and name in ("Llama", "Mistral", "Gemma-3", "gpt-oss", "Llama-4", "GPT-2", "T5", "BLOOM", "MPT"):
        assert all(call.lean for call in calls)
    if cache == "static" and name == "Llama-4":  # its prompt is of several chunks
        assert all(call.lean for call in decoding)


@pytest.mark.parametrize("name, full_layers", [("Llama", 2), ("Gemma-2", 1), ("T5", 2)])
def test_static_caches_take_no_mask(name: str, full_layers: int, calls: list[Seen]) -> None:
    """Where the device alone knows how full a cache is, layers that see all of it are told by its length: no mask of queries."""
    theirs, mine, batch = both(name)
    options: dict[str, Any] = {"cache_implementation": "static"}
    want = generated(theirs, batch, **options)
    calls.clear()
    assert torch.equal(generated(mine, batch, **options), want)
    told = [call for call in calls if call.cached and call.options["cache_lengths"] is not None]
    assert len(told) == 7 * full_layers and all(call.lean and call.options["causal"] for call in told)
    assert all((call.options["mask"] is None) == (name == "T5") for call in told)  # a row of keys where the prompt is padded
    assert all((call.options["bias"] is not None) == (name == "T5") for call in told)


def test_compiled_steps_on_a_static_cache(calls: list[Seen]) -> None:
    """As ``generate`` compiles them on GPUs: without a break, token for token."""
    theirs, mine, batch = both("Llama")
    want = generated(theirs, batch, cache_implementation="static")
    config = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    assert torch.equal(generated(mine, batch, cache_implementation="static", compile_config=config), want)


def test_gradients_through_a_static_cache(calls: list[Seen]) -> None:
    """Then a mask is made, and ``attention`` has the gradient."""
    theirs, mine, batch = both("Llama", "none")
    found = []
    for model in (theirs, mine):
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        with torch.no_grad():
            model(batch["input_ids"], past_key_values=cache)
        x = torch.randn(B, 2, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model.requires_grad_(False)
        y = model(inputs_embeds=x, past_key_values=cache).logits
        found.append(torch.autograd.grad(y.sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    assert any(call.q.shape[1] == 2 and not call.cached for call in calls)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "T5"])
def test_beam_search(name: str) -> None:
    theirs, mine, batch = both(name)
    assert torch.equal(generated(mine, batch, num_beams=3), generated(theirs, batch, num_beams=3))


def test_assisted_generation(calls: list[Seen]) -> None:
    """Several new tokens beside a cache at a time: M < N, and M > 1."""
    theirs, mine, batch = both("Llama")
    one = {name: x[1:2] for name, x in batch.items()}
    helper = made(BY_NAME["Llama"], num_hidden_layers=1).eval()
    want = generated(theirs, one, assistant_model=helper)
    calls.clear()
    assert torch.equal(generated(mine, one, assistant_model=helper), want)
    assert any(1 < call.q.shape[1] < call.k.shape[1] for call in calls) and all(call.lean for call in calls)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_chunked_prefill(name: str, calls: list[Seen]) -> None:
    theirs, mine, batch = both(name)
    want = generated(theirs, batch)
    calls.clear()
    assert torch.equal(generated(mine, batch, prefill_chunk_size=5), want)
    assert any(1 < call.q.shape[1] < call.k.shape[1] for call in calls) and all(call.lean for call in calls)


# Training as people do it.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "T5", "Mistral", "BEiT"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    family = BY_NAME[name]
    model, batch = made(family), inputs(family.kind, "left")
    want = results(model, batch)
    mine = ours(family, model)
    enable = getattr(mine, "activation_checkpointing_enable", mine.gradient_checkpointing_enable)
    enable(dict(use_reentrant=reentrant))
    if reentrant:  # whose inputs must want a gradient
        mine.enable_input_require_grads()
    same(results(mine.train(), batch), want)


@pytest.mark.parametrize("name", ["Llama", "T5", "gpt-oss"])
def test_bfloat16(name: str) -> None:
    family = BY_NAME[name]
    model, batch = made(family, **SMOOTH.get(family.name, {})), inputs(family.kind)
    exact = results(model, batch)
    eager = results(copy.deepcopy(model).bfloat16(), batch)
    got = results(ours(family, copy.deepcopy(model).bfloat16()), batch)
    near(got, eager, exact)


def test_autocast() -> None:
    family = BY_NAME["T5"]
    model, batch = made(family, **SMOOTH.get(family.name, {})), inputs(family.kind)
    exact = results(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        eager = results(model, batch)
        got = results(ours(family, model), batch)
    near(got, eager, exact)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma-3", "gpt-oss"])
def test_generate_under_autocast(name: str, cache: str) -> None:
    """Rotary embeddings leave keys in float32 there, beside values in 16 bits."""
    theirs, mine, batch = both(name)
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    with torch.autocast("cpu", torch.bfloat16):
        got = generated(mine, batch, output_logits=True, return_dict_in_generate=True, **options)
    tokens = got.sequences
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tokens[:, batch["input_ids"].shape[1] :])], 1)

    def logits() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": theirs.eval()(tokens, attention_mask=mask).logits[:, -len(got.logits) - 1 : -1]}

    exact = logits()
    with torch.autocast("cpu", torch.bfloat16):
        eager = logits()
    near({"logits": torch.stack(got.logits, 1)}, eager, exact)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["Llama", "T5", "Gemma-3", "BEiT", "ModernBERT"])
def test_compile(name: str) -> None:
    """One graph, and padding of any kind without looking at it."""
    family = BY_NAME[name]
    model = ours(family, made(family))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for side in ("right", "left"):
        batch = inputs(family.kind, side)
        want = results(model, batch)
        same({name.replace("_orig_mod.", ""): x for name, x in results(compiled, batch).items()}, want)


@pytest.mark.unpoisoned
def test_export() -> None:
    family = BY_NAME["Llama"]
    model, batch = ours(family, made(family)).eval(), inputs("causal", "left")
    del batch["labels"]
    shown = batch["attention_mask"].bool()
    exported = torch.export.export(model, (), {**batch, "use_cache": False})
    assert any("triflash" in str(node.target) for node in exported.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(**batch, use_cache=False).logits[shown], model(**batch).logits[shown])


def test_trainer(tmp_path: Path) -> None:
    """An epoch of Trainer with both: the same losses, the same weights."""
    pytest.importorskip("accelerate")
    torch.manual_seed(3)
    rows = [dict(input_ids=torch.randint(3, VOCABULARY, (L,)), labels=torch.randint(3, VOCABULARY, (6,))) for _ in range(8)]
    family, losses, weights = BY_NAME["T5"], [], []
    for implementation in ("eager", adapter.NAME):
        model = made(family, implementation)
        options = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=1, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True, seed=0,
            save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=options, train_dataset=rows)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.detach().cpu())
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def test_dropout_drops_and_scales(calls: list[Seen]) -> None:
    """The probability reaches the kernels in training alone; the mean over many draws is the result without."""
    family = BY_NAME["T5"]
    model = ours(family, made(family, dropout_rate=0.25))
    model.train()(**inputs("seq2seq"))
    assert {call.options["dropout_p"] for call in calls} == {0.25}
    calls.clear()
    model.eval()(**inputs("seq2seq"))
    assert {call.options["dropout_p"] for call in calls} == {0.0}


# On a GPU, and the examples.


SMOOTH = {"T5": {"feed_forward_proj": "gated-gelu"}}  # beside 16 bits a ReLU's gradient is there or not, by a rounding


def near(got: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """In 16 bits: as near to float32 as eager attention is, within a factor of two, for gradients of four. (A position bias's sums what
    should cancel over each row, and there the rounding of the output tells: docs/semantics.md, "Confident attention in 16 bits".)
    """
    assert got.keys() == eager.keys() == exact.keys()
    for key, x in exact.items():
        error, plain = (float((y[key].float() - x).norm()) for y in (got, eager))
        assert error <= (4 if key[0] == "∂" else 2) * plain + 2e-2 * float(x.norm()) + 1e-4, (
            f"{key}: {error}, {plain}, of {float(x.norm())}"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["T5", "Llama", "gpt-oss", "Mistral", "Swin, patched"])
def test_on_a_gpu(name: str) -> None:
    """In bfloat16, by fused kernels alone."""
    family = BY_NAME[name]
    side = "large" if family.kind == "image" else "left"
    model = made(family, **SMOOTH.get(family.name, {})).cuda()
    batch = {key: x.cuda() for key, x in inputs(family.kind, side).items()}
    exact = results(model, batch)
    half = {key: x.bfloat16() if x.is_floating_point() else x for key, x in batch.items()}
    eager = results(copy.deepcopy(model).bfloat16(), half)
    with triflash.record_launches() as ran:
        got = results(ours(family, copy.deepcopy(model).bfloat16()), half)
    assert ran and not any(launch.startswith(("tiled", "oracle")) for launch in ran), ran
    near(got, eager, exact)


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["T5", "Llama"])
def test_inductor_on_a_gpu(name: str) -> None:
    """One graph through Inductor under autocast, forward and backward."""
    family = BY_NAME[name]
    plain_model = made(family, **SMOOTH.get(family.name, {})).cuda()
    plain_model.config.use_cache = False  # whose making Dynamo of PyTorch 2.11 cannot trace
    model = ours(family, plain_model)
    batch = {key: x.cuda() for key, x in inputs(family.kind, "left").items()}
    torch._dynamo.reset()
    with torch.autocast("cuda", torch.bfloat16):
        got = results(torch.compile(model, fullgraph=True), batch)
        eager = results(plain_model, batch)
    near({key.replace("_orig_mod.", ""): x for key, x in got.items()}, eager, results(plain_model, batch))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["T5", "Llama", "Gemma-3"])
def test_generation_on_a_gpu(name: str) -> None:
    """Static caches, which transformers compiles there, and dynamic ones: the tokens of eager attention, in float32."""
    theirs, mine, batch = both(name)
    batch = {key: x.cuda() for key, x in batch.items()}
    want = generated(theirs.cuda(), batch)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generated(mine.cuda(), batch, **options), want)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("t5_finetune.py", ["--rows", "64", "--epochs", "1", "--longest", "4"], "the position bias moved by 0.0"),
        ("llama_generate.py", ["--tokens", "4"], "token for token the same: True"),
        ("swin_images.py", ["--steps", "2", "--batch", "2"], "triflash was called 8 times, the tables of positions moved by 0.00"),
    ],
)
def test_examples(name: str, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "t5_finetune.py":
        pytest.importorskip("accelerate")
    path = ROOT / "examples" / name
    assert path.read_text().count("\n") <= 80
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    with triflash.record_launches() as ran:
        runpy.run_path(str(path), run_name="__main__")
    assert says in capsys.readouterr().out
    assert ran or name != "t5_finetune.py"  # the others record their own
