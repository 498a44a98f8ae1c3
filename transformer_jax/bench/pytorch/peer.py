"""The same work in PyTorch, for `tjax bench-peers`: a script of its own that needs torch (and transformers) only.

Read by a process of its own, perhaps of another Python installation: one JSON line says what to build, then every line
"N" does the work N times and answers with the seconds of each. All parameters come from a file, in the names of the
library transformers. The decoder is written as nanoGPT's is (Karpathy 2022): pre-LN, one matrix for queries, keys and
values, scaled-dot-product attention, AdamW in one fused kernel. BERT, Marian and `generate` are those of transformers.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

Facts = dict[str, Any]
Spec = dict[str, Any]


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        width, inner, bias, eps = spec["width"], spec["feedforward"], spec["bias"], spec["norm_eps"]
        self.heads, self.dropout = spec["heads"], spec["dropout"]
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.up, self.down = nn.Linear(width, inner, bias=bias), nn.Linear(inner, width, bias=bias)

    def forward(self, x: Any) -> Any:
        """[B, T, D] -> [B, T, D]."""
        b, t, d = x.shape
        heads = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(*heads, is_causal=True, dropout_p=dropout)
        x = x + self._drop(self.out(y.transpose(1, 2).reshape(b, t, d)))
        return x + self._drop(self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh")))

    def _drop(self, x: Any) -> Any:
        return functional.dropout(x, self.dropout, self.training)


DECODER_NAMES = {"wte.": "tokens.", "wpe.": "positions.", "h.": "layers.", "ln_1.": "norm1.", "ln_2.": "norm2."}
DECODER_NAMES |= {"attn.c_attn.": "qkv.", "attn.c_proj.": "out.", "mlp.c_fc.": "up.", "mlp.c_proj.": "down."}
DECODER_NAMES |= {"ln_f.": "norm."}


class Decoder(nn.Module):
    """GPT-2: learned positions, tied output."""

    def __init__(self, spec: Spec, weights: dict[str, Any]) -> None:
        super().__init__()
        self.dropout = spec["dropout"]
        self.tokens = nn.Embedding(spec["vocab_size"], spec["width"])
        self.positions = nn.Embedding(spec["context"], spec["width"])
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec["layers"]))
        self.norm = nn.LayerNorm(spec["width"], spec["norm_eps"])
        ours = {}
        for theirs, tensor in weights.items():
            name = theirs
            for old, new in DECODER_NAMES.items():
                name = name.replace(old, new)
            ours[name] = tensor.T if ".c_" in theirs and tensor.ndim == 2 else tensor  # GPT-2 has them (in, out)
        fill(self, ours)

    def forward(self, batch: dict[str, Any]) -> Any:
        """Return the mean loss of "targets" [B, T] after "tokens" [B, T]."""
        tokens = batch["tokens"]
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = functional.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), batch["targets"].view(-1))


class Bert(nn.Module):
    """BERT of the transformers library; as in our program, only the gaps are scored."""

    def __init__(self, spec: Spec, weights: dict[str, Any]) -> None:
        super().__init__()
        from transformers import BertConfig, BertForPreTraining  # noqa: PLC0415

        config = BertConfig(
            vocab_size=spec["vocab_size"],
            hidden_size=spec["width"],
            num_hidden_layers=spec["layers"],
            num_attention_heads=spec["heads"],
            intermediate_size=spec["feedforward"],
            max_position_embeddings=spec["context"],
            type_vocab_size=spec["types"],
            hidden_dropout_prob=spec["dropout"],
            attention_probs_dropout_prob=spec["dropout"],
            layer_norm_eps=spec["norm_eps"],
            attn_implementation="sdpa",
        )
        self.model, self.next_sentence = BertForPreTraining(config), spec["next_sentence"]
        fill(self.model, {n if n.startswith("cls.") else f"bert.{n}": tensor for n, tensor in weights.items()})

    def forward(self, batch: dict[str, Any]) -> Any:
        """Return the mean loss of the gaps, and of the next sentence where that is a task."""
        read = self.model.bert(batch["tokens"], token_type_ids=batch["types"])
        places = batch["positions_masked"][..., None].expand(-1, -1, read.last_hidden_state.shape[-1])
        logits = self.model.cls.predictions(read.last_hidden_state.gather(1, places))
        gaps = functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        if not self.next_sentence:
            return gaps
        return gaps + functional.cross_entropy(self.model.cls.seq_relationship(read.pooler_output), batch["next"])


class Marian(nn.Module):
    """Marian of the transformers library, which is the Transformer as published; token 0 is padding."""

    def __init__(self, spec: Spec, weights: dict[str, Any]) -> None:
        super().__init__()
        from transformers import MarianConfig, MarianMTModel  # noqa: PLC0415

        places = spec["places"]
        config = MarianConfig(
            vocab_size=spec["vocab_size"],
            d_model=spec["width"],
            encoder_layers=spec["encoder_layers"],
            decoder_layers=spec["decoder_layers"],
            encoder_attention_heads=spec["heads"],
            decoder_attention_heads=spec["heads"],
            encoder_ffn_dim=spec["feedforward"],
            decoder_ffn_dim=spec["feedforward"],
            dropout=spec["dropout"],
            activation_function="relu",
            max_position_embeddings=places,
            scale_embedding=True,
            pad_token_id=0,
            eos_token_id=None,
            forced_eos_token_id=None,
            attn_implementation="sdpa",
        )
        self.model, self.smoothing = MarianMTModel(config), spec.get("smoothing")
        rates = 10_000.0 ** (-torch.arange(0, spec["width"], 2) / spec["width"])
        angles = torch.arange(places)[:, None] * rates
        for side in (self.model.model.encoder, self.model.model.decoder):
            # Sines and cosines by turns, as published; Marian has all sines first.
            side.embed_positions.weight.data = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        for name, module in self.model.named_modules():
            if name.endswith("_proj") and not spec["bias"]:
                module.bias = None
        fill(self.model.model, weights)

    def forward(self, batch: dict[str, Any]) -> Any:
        """Return the mean loss of the real tokens of "target" [B, T + 1] after "source" [B, S]."""
        source, target = batch["source"], batch["target"]
        read = self.model(
            source, attention_mask=(source != 0).long(), decoder_input_ids=target[:, :-1], use_cache=False
        )
        return functional.cross_entropy(
            read.logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0, label_smoothing=self.smoothing
        )


MODELS: dict[str, Any] = {"gpt": Decoder, "bert": Bert, "marian": Marian}


def fill(model: Any, weights: dict[str, Any]) -> None:
    """Take all parameters from a file's tensors; ends the process if any is not there, or too many."""
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    missing = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - weights.keys()
    if unexpected or missing:
        sys.exit(f"another model: without {sorted(missing)[:3]}, with {sorted(unexpected)[:3]}")


def trainer(spec: Spec, device: Any) -> tuple[Callable[[], Any], Facts]:
    """Build model and optimizer; return what takes a step, and the loss without dropout before any."""
    torch.set_float32_matmul_precision("high")
    model: Any = MODELS[spec["kind"]](spec, load_file(spec["weights"])).to(device)
    batch = {name: torch.tensor(values, device=device) for name, values in spec["batch"].items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=spec["rate"], betas=(0.9, 0.95), weight_decay=spec["weight_decay"], fused=True
    )
    forward = torch.compile(model) if spec["variant"].startswith("compile") else model
    half = spec["dtype"] == "bfloat16"

    def loss_of(model: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=half), attention(spec["variant"]):
            return model(batch)

    def step() -> None:
        loss = loss_of(forward)
        loss.backward()
        if spec["clip_norm"]:
            nn.utils.clip_grad_norm_(trained, spec["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for the device

    with torch.no_grad():
        loss = float(loss_of(model.eval()))
    model.train()
    return step, {"parameters": sum(parameter.numel() for parameter in trained), "loss": loss}


def gpt2(spec: Spec) -> tuple[Any, Facts]:
    """Build GPT-2 of the transformers library, and say how it continues prompts: greedily."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    config = GPT2Config(
        vocab_size=spec["vocab_size"],
        n_positions=spec["context"],
        n_embd=spec["width"],
        n_layer=spec["layers"],
        n_head=spec["heads"],
        n_inner=spec["feedforward"],
        layer_norm_epsilon=spec["norm_eps"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model: Any = GPT2LMHeadModel(config)
    fill(model, {f"transformer.{name}": tensor for name, tensor in load_file(spec["weights"]).items()})
    return model, {}


def marian(spec: Spec) -> tuple[Any, Facts]:
    """Build Marian, and say how it searches; like ours it writes neither padding nor the start."""
    start = spec["start"]
    options = {"num_beams": spec["beams"], "decoder_start_token_id": start, "suppress_tokens": [0, start]}
    return Marian(spec, load_file(spec["weights"])).model, options | {"length_penalty": spec["length_penalty"]}


WRITERS: dict[str, Any] = {"generate": gpt2, "translate": marian}


def writer(spec: Spec, device: Any) -> tuple[Callable[[], Any], Facts]:
    """Build a model; return what reads the prompts and writes after them, and the tokens that it writes."""
    from transformers import CompileConfig  # noqa: PLC0415

    model, options = WRITERS[spec["kind"]](spec)
    model = model.eval().to(device, getattr(torch, spec["dtype"]))
    prompts = torch.tensor(spec["prompts"], device=device)
    options |= {"max_new_tokens": spec["new"], "do_sample": False, "attention_mask": torch.ones_like(prompts)}
    if spec["variant"] != "dynamic":
        options |= {"cache_implementation": "static", "disable_compile": spec["variant"] == "static"}
    if spec["variant"] == "static-compile":
        compiled = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")
        compiled._compile_all_devices = True
        options["compile_config"] = compiled

    def write() -> list[list[int]]:
        with torch.inference_mode():
            return model.generate(prompts, **options)[:, -spec["new"] :].tolist()

    trained = (parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return write, {"parameters": sum(trained), "written": write()}


@contextlib.contextmanager
def attention(variant: str) -> Iterator[None]:
    """Choose the kernel of attention: cuDNN's where the name says so, else what PyTorch takes."""
    if not variant.endswith("cudnn"):
        yield
        return
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        yield


def main() -> None:
    """Serve work until the other side closes."""
    reply = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    spec = json.loads(sys.stdin.readline())
    device = torch.device("cuda" if spec["device"] == "gpu" else "cpu")
    torch.manual_seed(0)
    start = time.perf_counter()
    work, facts = (writer if spec["kind"] in WRITERS else trainer)(spec, device)
    work()
    facts |= {"first_seconds": time.perf_counter() - start}
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(facts), file=reply, flush=True)
    for line in sys.stdin:
        seconds, cpu = [], []
        for _ in range(int(line)):
            before, busy = time.perf_counter(), time.process_time()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - before)
            cpu.append(time.process_time() - busy)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}), file=reply, flush=True)


if __name__ == "__main__":
    main()
