"""BERT, GPT-2 and Llama once more, in plain NumPy and float64, read straight from a Hugging Face folder.

Written from the definitions in the papers and in the transformers library, on its names, so that it shares nothing
with the models and the tables whose work it checks. It is slow and short. Letters as in `nn/attention.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Read = Callable[[str], NDArray[Any]]
"""Returns a tensor, as it is stored, by its name without the family's prefix."""
Batch = Mapping[str, NDArray[np.int32]]
"""tokens, types, segments (0: padding): [B, T]."""

Config = Mapping[str, Any]


def gelu(x: Array) -> Array:
    """GELU (Hendrycks and Gimpel 2016, section 2)."""
    from scipy.special import erf  # noqa: PLC0415 - takes a quarter of a second

    half: Array = 0.5 * x * (1 + erf(x / math.sqrt(2)))
    return half


def gelu_tanh(x: Array) -> Array:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def parameter(read: Read, name: str) -> Array:
    """Read a tensor as float64."""
    return read(name).astype(np.float64)


def lookup(ids: NDArray[np.int32], read: Read, name: str) -> Array:
    """torch.nn.Embedding, without a float64 copy of all of it."""
    rows: Array = read(name)[ids].astype(np.float64)
    return rows


def scores(x: Array, read: Read, name: str) -> Array:
    """Multiply by the transposed embedding, a few thousand rows at a time."""
    table = read(name)
    parts = [x @ table[i : i + 4096].astype(np.float64).T for i in range(0, len(table), 4096)]
    return np.concatenate(parts, axis=-1)


def layer_norm(x: Array, read: Read, name: str, eps: float) -> Array:
    """Ba 2016."""
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed * parameter(read, f"{name}.weight") + parameter(read, f"{name}.bias")


def rms_norm(x: Array, read: Read, name: str, eps: float) -> Array:
    """Zhang and Sennrich 2019."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * parameter(read, f"{name}.weight")


def linear(x: Array, read: Read, name: str, *, bias: bool = True) -> Array:
    """torch.nn.Linear, whose weight is (out, in)."""
    y = x @ parameter(read, f"{name}.weight").T
    return y + parameter(read, f"{name}.bias") if bias else y


def attend(q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, visible_BTS: NDArray[np.bool_]) -> Array:
    """Vaswani 2017, section 3.2: [B, T, N H]."""
    b, t, n, h = q_BTNH.shape
    scores_BNTS = np.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH) / math.sqrt(h)
    scores_BNTS = np.where(visible_BTS[:, None], scores_BNTS, -1e30)
    weights_BNTS = np.exp(scores_BNTS - scores_BNTS.max(-1, keepdims=True))
    weights_BNTS /= weights_BNTS.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights_BNTS, v_BSNH).reshape(b, t, n * h)


def bert(config: Config, read: Read, names: frozenset[str], batch: Batch) -> dict[str, Array]:
    """Devlin 2018, section 3."""
    tokens_BT, real_BT = batch["tokens"], batch["segments"] != 0
    b, t = tokens_BT.shape
    heads, eps = config["num_attention_heads"], config.get("layer_norm_eps", 1e-12)
    activation = ACTIVATIONS[config["hidden_act"]]
    x = lookup(tokens_BT, read, "embeddings.word_embeddings.weight")
    x = x + parameter(read, "embeddings.position_embeddings.weight")[:t]
    x = x + lookup(batch["types"], read, "embeddings.token_type_embeddings.weight")
    x = layer_norm(x, read, "embeddings.LayerNorm", eps)
    visible_BTS = np.broadcast_to(real_BT[:, None, :], (b, t, t))
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, read, f"{at}.attention.self.{part}").reshape(b, t, heads, -1)
            for part in ("query", "key", "value")
        )
        attended = linear(attend(q, k, v, visible_BTS), read, f"{at}.attention.output.dense")
        x = layer_norm(x + attended, read, f"{at}.attention.output.LayerNorm", eps)
        hidden = activation(linear(x, read, f"{at}.intermediate.dense"))
        x = layer_norm(x + linear(hidden, read, f"{at}.output.dense"), read, f"{at}.output.LayerNorm", eps)
    outputs: dict[str, Array] = {}
    pooled = np.tanh(linear(x[:, 0], read, "pooler.dense")) if "pooler.dense.weight" in names else None
    if "cls.predictions.bias" in names:
        h = activation(linear(x, read, "cls.predictions.transform.dense"))
        h = layer_norm(h, read, "cls.predictions.transform.LayerNorm", eps)
        outputs["mlm"] = scores(h, read, "embeddings.word_embeddings.weight") + parameter(read, "cls.predictions.bias")
        if pooled is not None and "cls.seq_relationship.weight" in names:
            outputs["nsp"] = linear(pooled, read, "cls.seq_relationship")
    elif "qa_outputs.weight" in names:
        outputs["span"] = linear(x, read, "qa_outputs")
    elif "classifier.weight" in names:
        if config["architectures"][0] == "BertForTokenClassification":
            outputs["tag"] = linear(x, read, "classifier")
        elif pooled is not None:
            outputs["classify"] = linear(pooled, read, "classifier")
    else:
        outputs["hidden"] = x
        if pooled is not None:
            outputs["pooled"] = pooled
    return outputs


def gpt2(config: Config, read: Read, names: frozenset[str], batch: Batch) -> dict[str, Array]:
    """Radford 2019, section 2.3."""
    tokens_BT = batch["tokens"]
    b, t = tokens_BT.shape
    heads, eps = config["n_head"], config.get("layer_norm_epsilon", 1e-5)
    visible_BTS = causal(batch, 0)

    def conv1d(x: Array, name: str) -> Array:
        """Their name of a linear map whose weight is (in, out)."""
        return x @ parameter(read, f"{name}.weight") + parameter(read, f"{name}.bias")

    x = lookup(tokens_BT, read, "wte.weight") + parameter(read, "wpe.weight")[:t]
    for i in range(config["n_layer"]):
        h = layer_norm(x, read, f"h.{i}.ln_1", eps)
        q, k, v = (part.reshape(b, t, heads, -1) for part in np.split(conv1d(h, f"h.{i}.attn.c_attn"), 3, axis=-1))
        x = x + conv1d(attend(q, k, v, visible_BTS), f"h.{i}.attn.c_proj")
        h = ACTIVATIONS[config["activation_function"]](
            conv1d(layer_norm(x, read, f"h.{i}.ln_2", eps), f"h.{i}.mlp.c_fc")
        )
        x = x + conv1d(h, f"h.{i}.mlp.c_proj")
    x = layer_norm(x, read, "ln_f", eps)
    return {"next": scores(x, read, "wte.weight" if config.get("tie_word_embeddings", True) else "lm_head.weight")}


def llama(config: Config, read: Read, names: frozenset[str], batch: Batch) -> dict[str, Array]:
    """Touvron 2023, with Ainslie 2023 (grouped queries); Jiang 2023 (windows); Qwen 3 (norms of queries and keys)."""
    tokens_BT = batch["tokens"]
    b, t = tokens_BT.shape
    heads, mixtral = config["num_attention_heads"], config["model_type"] == "mixtral"
    eps = config.get("rms_norm_eps", 1e-5 if mixtral else 1e-6)
    kv_heads = config.get("num_key_value_heads", heads)
    rope = config.get("rope_parameters") or config
    theta = rope.get("rope_theta", 10_000.0)
    windows = sliding_windows(config)
    bias = bool(config.get("attention_bias"))

    def rotate(x_BTNH: Array) -> Array:
        """Turn channel i with channel i + H / 2 as one complex number (Su 2021)."""
        half = x_BTNH.shape[-1] // 2
        angle_T1H = (np.arange(t)[:, None] / theta ** (np.arange(half) / half))[:, None, :]
        z = (x_BTNH[..., :half] + 1j * x_BTNH[..., half:]) * np.exp(1j * angle_T1H)
        return np.concatenate([z.real, z.imag], axis=-1)

    x = lookup(tokens_BT, read, "embed_tokens.weight")
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}"
        h = rms_norm(x, read, f"{at}.input_layernorm", eps)
        q = linear(h, read, f"{at}.self_attn.q_proj", bias=bias).reshape(b, t, heads, -1)
        k = linear(h, read, f"{at}.self_attn.k_proj", bias=bias).reshape(b, t, kv_heads, -1)
        v = linear(h, read, f"{at}.self_attn.v_proj", bias=bias).reshape(b, t, kv_heads, -1)
        if config["model_type"] == "qwen3":
            q = rms_norm(q, read, f"{at}.self_attn.q_norm", eps)
            k = rms_norm(k, read, f"{at}.self_attn.k_norm", eps)
        k, v = (np.repeat(part, heads // kv_heads, axis=2) for part in (rotate(k), v))
        visible_BTS = causal(batch, windows[i])
        x = x + linear(attend(rotate(q), k, v, visible_BTS), read, f"{at}.self_attn.o_proj", bias=bias)
        h = rms_norm(x, read, f"{at}.post_attention_layernorm", eps)
        if config["model_type"] == "mixtral":
            x = x + mixture(h, read, f"{at}.block_sparse_moe", config)
            continue
        gate = ACTIVATIONS["silu"](linear(h, read, f"{at}.mlp.gate_proj", bias=bool(config.get("mlp_bias"))))
        h = gate * linear(h, read, f"{at}.mlp.up_proj", bias=bool(config.get("mlp_bias")))
        x = x + linear(h, read, f"{at}.mlp.down_proj", bias=bool(config.get("mlp_bias")))
    x = rms_norm(x, read, "norm", eps)
    return {"next": scores(x, read, "embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight")}


def mixture(x_BTD: Array, read: Read, name: str, config: Config) -> Array:
    """Jiang 2024, section 2.1: the softmax of the best scores weighs their experts."""
    scores_BTE = linear(x_BTD, read, f"{name}.gate", bias=False)
    least_BT1 = np.sort(scores_BTE, axis=-1)[..., -config.get("num_experts_per_tok", 2), None]
    weight_BTE = np.exp(np.where(scores_BTE >= least_BT1, scores_BTE - scores_BTE.max(-1, keepdims=True), -np.inf))
    weight_BTE /= weight_BTE.sum(-1, keepdims=True)
    total = np.zeros_like(x_BTD)
    for e in range(scores_BTE.shape[-1]):
        at = f"{name}.experts.{e}"
        gate = ACTIVATIONS["silu"](linear(x_BTD, read, f"{at}.w1", bias=False))
        h = gate * linear(x_BTD, read, f"{at}.w3", bias=False)
        total += weight_BTE[..., e, None] * linear(h, read, f"{at}.w2", bias=False)
    return total


def sliding_windows(config: Config) -> list[int]:
    """How far back each layer sees; 0 is all."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window", 4096) or 0
    if config["model_type"] == "mixtral":
        window = config.get("sliding_window") or 0
    if config["model_type"] == "llama" or (config["model_type"] == "qwen3" and not config.get("use_sliding_window")):
        window = 0
    if "layer_types" in config:
        return [window if kind == "sliding_attention" else 0 for kind in config["layer_types"]]
    first = config.get("max_window_layers", 28) if config["model_type"] == "qwen3" else 0
    return [window if layer >= first else 0 for layer in range(layers)]


def causal(batch: Batch, window: int) -> NDArray[np.bool_]:
    """Let a token see real tokens up to its own place, of them the last `window` (0: all): [B, T, S]."""
    real_BT = batch["segments"] != 0
    distance_TS = np.subtract.outer(np.arange(real_BT.shape[1]), np.arange(real_BT.shape[1]))
    near_TS = (distance_TS >= 0) & ((distance_TS < window) | (window == 0))
    return near_TS & real_BT[:, None, :]


REFERENCES = {"bert": bert, "gpt2": gpt2, "llama": llama, "mixtral": llama}
