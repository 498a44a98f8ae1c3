"""The same work in PyTorch, for `tjax bench-peers`: a script of its own that needs torch (and transformers) only.

Read by a process of its own, perhaps of another Python installation: one JSON line says what to build, then every line
"N" takes N steps and answers with their seconds. The decoder is written as nanoGPT's is (Karpathy 2022): pre-LN, one
matrix for queries, keys and values, scaled-dot-product attention, AdamW in one fused kernel.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        width, inner, bias = spec["width"], spec["feedforward"], spec["bias"]
        self.heads, self.dropout = spec["heads"], spec["dropout"]
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
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


class Decoder(nn.Module):
    """GPT-2: learned positions, tied output."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.dropout = spec["dropout"]
        self.tokens = nn.Embedding(spec["vocab_size"], spec["width"])
        self.positions = nn.Embedding(spec["context"], spec["width"])
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec["layers"]))
        self.norm = nn.LayerNorm(spec["width"])
        self.apply(_initialise)

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

    def __init__(self, spec: dict[str, Any]) -> None:
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
        )
        config._attn_implementation = "sdpa"
        self.model = BertForPreTraining(config)

    def forward(self, batch: dict[str, Any]) -> Any:
        """Return the sum of the mean losses of the gaps and of the next sentence."""
        read = self.model.bert(batch["tokens"], token_type_ids=batch["types"])
        places = batch["positions_masked"][..., None].expand(-1, -1, read.last_hidden_state.shape[-1])
        logits = self.model.cls.predictions(read.last_hidden_state.gather(1, places))
        gaps = functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        return gaps + functional.cross_entropy(self.model.cls.seq_relationship(read.pooler_output), batch["next"])


def _initialise(module: Any) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def stepper(spec: dict[str, Any], device: Any) -> tuple[Callable[[], float], int]:
    """Build model and optimizer; return a function that takes a step and returns its loss, and the parameters."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    built: Any = Decoder(spec) if spec["kind"] == "gpt" else Bert(spec)
    model = built.to(device).train()
    batch = {name: torch.tensor(values, device=device) for name, values in spec["batch"].items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec["rate"], betas=(0.9, 0.95), weight_decay=spec["weight_decay"], fused=True
    )
    forward = torch.compile(model) if spec["variant"].startswith("compile") else model
    half = spec["dtype"] == "bfloat16"

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=half), attention(spec["variant"]):
            loss = forward(batch)
        loss.backward()
        if spec["clip_norm"]:
            nn.utils.clip_grad_norm_(model.parameters(), spec["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device

    return step, sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def attention(variant: str) -> Iterator[None]:
    """Choose the kernel of attention: cuDNN's where the name says so, else what PyTorch takes."""
    if not variant.endswith("cudnn"):
        yield
        return
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        yield


def main() -> None:
    """Serve steps until the other side closes."""
    reply = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    spec = json.loads(sys.stdin.readline())
    device = torch.device("cuda" if spec["device"] == "gpu" else "cpu")
    start = time.perf_counter()
    step, parameters = stepper(spec, device)
    loss = step()
    ready = {"parameters": parameters, "loss": loss, "first_seconds": time.perf_counter() - start}
    ready |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(ready), file=reply, flush=True)
    for line in sys.stdin:
        seconds, cpu = [], []
        for _ in range(int(line)):
            before, busy = time.perf_counter(), time.process_time()
            loss = step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - before)
            cpu.append(time.process_time() - busy)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        print(json.dumps({"seconds": seconds, "cpu": cpu, "loss": loss, "peak": peak}), file=reply, flush=True)


if __name__ == "__main__":
    main()
