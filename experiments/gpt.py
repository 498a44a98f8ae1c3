"""GPT-2 (Radford 2019), GPT-3 (Brown 2020), and small ones for the text that ships with us."""

from __future__ import annotations

from dataclasses import replace

from transformer_jax.config import ComputeConfig, Experiment, OptimConfig, Published, ScheduleConfig, TrainConfig
from transformer_jax.data.packed import PackedText
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.objectives import CausalLM

GPT2 = GPTConfig()
GPT3 = GPTConfig(context=2048, windows=(0, 256))


def gpt2_124m() -> Experiment:
    """GPT-2 small (Radford 2019, table 2), which the paper counts as 117M."""
    steps = 600_000
    return Experiment(
        name="gpt2_124m",
        model=GPT2,
        objective=CausalLM(),
        # 512 x 1024 tokens a batch (section 2.3). WebText was not published; C4 stands in. Whether documents of a row
        # see each other is not said; as in GPT-3 they do.
        data=PackedText(dataset="c4/en", context=1024, batch_rows=512, rows_multiple=512, separate=False),
        optim=OptimConfig(
            # The paper gives no rates; these are those with which it has been reproduced.
            schedule=ScheduleConfig(kind="cosine", peak=6e-4, warmup=2000, steps=steps, final=0.1),
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=steps, log_every=100, eval_every=2000, save_every=2000),
        compute=ComputeConfig(dtype="bfloat16"),
        published=Published(
            parameters=124_000_000,
            source="OpenAI's model card; Radford 2019, table 2 says 117M",
            note="The paper's counts leave something out; the released weights have 124,439,808.",
        ),
    )


def _gpt2(name: str, published: int, card: str, *, width: int, layers: int, heads: int, peak: float) -> Experiment:
    small = gpt2_124m()
    return replace(
        small,
        name=name,
        model=replace(GPT2, width=width, layers=layers, heads=heads),
        optim=replace(small.optim, schedule=replace(small.optim.schedule, peak=peak)),
        published=Published(parameters=published, source=f"OpenAI's model card; Radford 2019, table 2 says {card}"),
    )


def gpt2_355m() -> Experiment:
    """GPT-2 medium (Radford 2019, table 2)."""
    return _gpt2("gpt2_355m", 355_000_000, "345M", width=1024, layers=24, heads=16, peak=3e-4)


def gpt2_774m() -> Experiment:
    """GPT-2 large (Radford 2019, table 2)."""
    return _gpt2("gpt2_774m", 774_000_000, "762M", width=1280, layers=36, heads=20, peak=2.5e-4)


def gpt2_1558m() -> Experiment:
    """GPT-2 XL (Radford 2019, table 2)."""
    return _gpt2("gpt2_1558m", 1_558_000_000, "1542M", width=1600, layers=48, heads=25, peak=2e-4)


def _gpt3(
    name: str,
    published: float,
    *,
    width: int,
    layers: int,
    heads: int,
    batch: float,
    peak: float,
    note: str = "",
) -> Experiment:
    """Table 2.1 and appendix B of Brown 2020.

    The rate warms up over 375M tokens and falls to 10 % over 260B; the batch grows linearly from 32,000 tokens to its
    full size over the first 4 to 12B tokens, here in steps of doubling rows over 8B. Documents of a row see each other.
    """
    rows = round(batch / 2048 / 256) * 256
    ramp = _ramp(rows, 8e9)
    warmup, decay, total = (_steps(tokens, rows, ramp) for tokens in (375e6, 260e9, 300e9))
    return Experiment(
        name=name,
        model=replace(GPT3, width=width, layers=layers, heads=heads),
        objective=CausalLM(chunk=256),
        data=PackedText(dataset="c4/en", context=2048, batch_rows=rows, rows_multiple=16, ramp=ramp, separate=False),
        optim=OptimConfig(
            schedule=ScheduleConfig(kind="cosine", peak=peak, warmup=warmup, steps=decay, final=0.1),
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=total, log_every=100, eval_every=2000, save_every=2000),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        published=Published(
            parameters=round(published),
            source="Brown 2020, table 2.1",
            note=f"{note}The band of the sparse layers is not given there; 256 positions are ours. The filtered Common "
            "Crawl, WebText2 and the books were not published; C4 stands in.",
        ),
    )


def _ramp(rows: int, tokens: float) -> tuple[tuple[int, int], ...]:
    """Double the rows of a batch from 16 (32,768 tokens) up to `rows`, each size for an equal share of the tokens."""
    sizes = []
    size = 16
    while size < rows:
        sizes.append(size)
        size *= 2
    return tuple((size, round(tokens / len(sizes) / (size * 2048))) for size in sizes)


def _steps(tokens: float, rows: int, ramp: tuple[tuple[int, int], ...]) -> int:
    """Count the steps after which so many tokens have been seen."""
    steps = 0
    for stage, length in ramp:
        if tokens <= stage * 2048 * length:
            return steps + round(tokens / (stage * 2048))
        tokens -= stage * 2048 * length
        steps += length
    return steps + round(tokens / (rows * 2048))


def gpt3_125m() -> Experiment:
    """GPT-3 Small (Brown 2020, table 2.1)."""
    return _gpt3("gpt3_125m", 125e6, width=768, layers=12, heads=12, batch=0.5e6, peak=6e-4)


def gpt3_350m() -> Experiment:
    """GPT-3 Medium (Brown 2020, table 2.1)."""
    return _gpt3("gpt3_350m", 350e6, width=1024, layers=24, heads=16, batch=0.5e6, peak=3e-4)


def gpt3_760m() -> Experiment:
    """GPT-3 Large (Brown 2020, table 2.1)."""
    return _gpt3("gpt3_760m", 760e6, width=1536, layers=24, heads=16, batch=0.5e6, peak=2.5e-4)


def gpt3_1300m() -> Experiment:
    """GPT-3 XL (Brown 2020, table 2.1)."""
    note = "The table's 24 heads of 128 channels at a width of 2048 would make 1.52B; 16 heads make its 1.3B. "
    return _gpt3("gpt3_1300m", 1.3e9, width=2048, layers=24, heads=16, batch=1e6, peak=2e-4, note=note)


def gpt3_2700m() -> Experiment:
    """GPT-3 2.7B (Brown 2020, table 2.1)."""
    return _gpt3("gpt3_2700m", 2.7e9, width=2560, layers=32, heads=32, batch=1e6, peak=1.6e-4)


def gpt3_6700m() -> Experiment:
    """GPT-3 6.7B (Brown 2020, table 2.1)."""
    return _gpt3("gpt3_6700m", 6.7e9, width=4096, layers=32, heads=32, batch=2e6, peak=1.2e-4)


def gpt3_13b() -> Experiment:
    """GPT-3 13B (Brown 2020, table 2.1)."""
    note = "The table's width is 5140, which its 40 heads of 128 channels do not make; 5120 here. "
    return _gpt3("gpt3_13b", 13e9, width=5120, layers=40, heads=40, batch=2e6, peak=1e-4, note=note)


def gpt3_175b() -> Experiment:
    """GPT-3 (Brown 2020, table 2.1)."""
    return _gpt3("gpt3_175b", 175e9, width=12_288, layers=96, heads=96, batch=3.2e6, peak=0.6e-4)


def gpt2_demo() -> Experiment:
    """A small GPT-2 for 2 CPU cores and four plays of Shakespeare; about 5 minutes."""
    steps = 1500
    return Experiment(
        name="gpt2_demo",
        model=GPTConfig(vocab_size=1024, context=128, width=128, layers=4, heads=4, dropout=0.1),
        objective=CausalLM(),
        data=PackedText(dataset="tjax_text/shakespeare", context=128, batch_rows=16),
        optim=OptimConfig(
            schedule=ScheduleConfig(kind="cosine", peak=3e-3, warmup=100, steps=steps, final=0.1),
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=steps, eval_every=150, save_every=300),
    )


def gpt2_shakespeare_char() -> Experiment:
    """Characters of Shakespeare, the setting that everyone knows (Karpathy's nanoGPT); validation loss 1.47 there."""
    steps = 5000
    return Experiment(
        name="gpt2_shakespeare_char",
        model=GPTConfig(vocab_size=72, context=256, width=384, layers=6, heads=6, bias=False, dropout=0.2),
        objective=CausalLM(),
        # 90 % of one text for training, in crops; the end of it for validation.
        data=PackedText(dataset="tiny_shakespeare", tokenizer="characters", context=256, batch_rows=64, separate=False),
        optim=OptimConfig(
            schedule=ScheduleConfig(kind="cosine", peak=1e-3, warmup=100, steps=steps, final=0.1),
            b2=0.99,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=steps, log_every=50, eval_every=250, save_every=1000),
        compute=ComputeConfig(dtype="bfloat16"),
    )


def llama_style_114m() -> Experiment:
    """The same decoder in the dialect of Llama (Touvron 2023): RMSNorm, SwiGLU, RoPE, grouped queries, no biases."""
    gpt2 = gpt2_124m()
    return replace(
        gpt2,
        name="llama_style_114m",
        model=replace(
            GPT2,
            vocab_size=50_304,
            norm="rmsnorm",
            activation="silu",
            gated=True,
            feedforward=2048,
            positions="rope",
            kv_heads=4,
            bias=False,
            context=2048,
        ),
        data=PackedText(dataset="c4/en", context=2048, batch_rows=256, rows_multiple=256),
        published=None,
    )
