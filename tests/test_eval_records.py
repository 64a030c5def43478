"""What every result file says of a run, by each evaluation alike, and the answers that a stopped run goes on from."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import tiny_session
from safetensors.torch import load_file
from tiny_session import Tiny

import mmadapter
from eval import caption, instruct, kept, ner, ner_texts, qa, records, report_runs, scienceqa
from mmadapter import checkpoint
from mmadapter import record as record_module
from mmadapter.checkpoint import FILE_NAME, Fingerprint
from mmadapter.record import file_sha256, write_json
from mmadapter.tokenizer import open_tokenizer

# Beside its own scores and settings, every result file has these.
FIELDS = (
    *("task", "version", "limit", "seed", "shots", "adapter", "adapter_hash", "base", "base_hash", "base_fingerprint"),
    *("model", "command", "git_commit", "answers_made_by", "versions", "time", "data_hash", "images_hash"),
    *("predictions_hash", "seconds", "predictions"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


def model_options(tiny: Tiny, adapter: object) -> list[str]:
    return ["--llama", str(tiny.llama), "--dtype", "float32", "--adapter", str(adapter)]


def written(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def caption_run(tiny: Tiny, folder: Path) -> tuple[object, list[str]]:
    images = [
        {"imgid": n, "filename": f"{n}.png", "split": "train" if n else "test", "sentences": [{"raw": f"dog {n}"}]}
        for n in range(3)
    ]
    annotations = written(folder / "dataset_tiny.json", {"images": images})
    return caption, ["--annotations", str(annotations), "--images", str(tiny.pictures)]


def qa_run(tiny: Tiny, folder: Path) -> tuple[object, list[str]]:
    rows = [{"question": f"Q {n}?", "answer": "dog", "split": "train" if n else "test"} for n in range(3)]
    return qa, ["--gold", str(written(folder / "rows.json", rows)), "--max-new-tokens", "2"]


def scienceqa_run(tiny: Tiny, folder: Path) -> tuple[object, list[str]]:
    problems = {
        str(n): {"question": f"Q {n}?", "choices": ["a", "b"], "answer": 0, "split": "train" if n else "test"}
        for n in range(3)
    }
    written(folder / "problems.json", problems)
    written(folder / "pid_splits.json", {"test": ["0"], "train": ["1", "2"]})
    return scienceqa, ["--data", str(folder), "--score", "likelihood"]


def instruct_run(tiny: Tiny, folder: Path) -> tuple[object, list[str]]:
    rows = [{"instruction": f"Say {n}.", "output": "dog"} for n in range(5)]
    return instruct, ["--data", str(written(folder / "rows.json", rows)), "--held-out", "2"]


def ner_run(tiny: Tiny, folder: Path) -> tuple[object, list[str]]:
    folder.mkdir(parents=True)
    for name in ("gold", "train"):
        lines = ["TOKEN\tNE-COARSE-LIT", f"# hipe2022:document_id = {name}", "Paris\tB-loc", "dort\tO", ""]
        (folder / f"{name}.tsv").write_text("\n".join(lines))
    options = ["--gold", str(folder / "gold.tsv"), "--train", str(folder / "train.tsv"), "--max-new-tokens", "2"]
    return ner, options


@pytest.mark.parametrize("run", [caption_run, qa_run, scienceqa_run, instruct_run, ner_run])
def test_every_result_file_has_the_same_fields(run, tiny, tmp_path, monkeypatch):
    """And `--adapter none --shots 1 --seed 3` asks the base of every task with an example."""
    monkeypatch.setattr("eval.caption_metrics.java_version", lambda: None)
    monkeypatch.setattr(ner_texts, "INSTRUCTIONS", {"json": "List {types}"})  # short, as the tiny context is
    command, options = run(tiny, tmp_path / "data")
    out = tmp_path / "scores.json"
    base = {"base": str(tiny.llama), "base_hash": records.base_identity(str(tiny.llama))["base_hash"]}
    for adapter, shots in ((tiny.reads if command is not caption else tiny.sees, 0), ("none", 1)):
        given = ["--shots", str(shots), "--seed", "3", "--json", str(out)]
        assert command.main([*options, *model_options(tiny, adapter), *given]) == 0
        record = json.loads(out.read_text())
        assert [name for name in FIELDS if name not in record] == []
        assert (record["adapter"], record["shots"], record["seed"]) == (str(adapter), shots, 3)
        assert record["adapter_hash"] == (None if adapter == "none" else file_sha256(adapter / FILE_NAME))
        assert {name: record[name] for name in base} == base
        assert record["base_fingerprint"]["layers"] == 3
        assert record["model"]["dtype"] == "float32"
        assert len(record["model"]["shots"]) == shots
        assert record["command"].endswith(f"--shots {shots} --seed 3 --json {out}")
        assert record["versions"]["torch"]
        assert record["versions"]["numpy"]
        assert record["versions"]["mmadapter"] == mmadapter.__version__
        assert record["answers_made_by"] == [record["git_commit"] or "unknown"]
        assert 0 <= record["seconds"] < 600  # a tenth is as fine as it gets
        assert all(isinstance(one, dict) for one in record["predictions"])
        assert len(record["predictions"]) == (2 if command is instruct else 1)


def test_a_base_is_known_by_its_weights(tiny, tmp_path):
    """The same shapes with other weights are another base; where it lies does not matter."""
    tokens = open_tokenizer(tiny.llama)
    config = tiny_session.llama_config(tokens.vocab_size)
    first = records.base_identity(str(tiny.llama))
    assert first["base_fingerprint"] == vars(Fingerprint.of(config, tokens.tokens()))
    copy = shutil.copytree(tiny.llama, tmp_path / "copy")
    assert records.base_identity(str(copy)) == first
    assert records.base_identity(str(tiny.bare))["base_fingerprint"]["vocabulary"] is None
    [weights] = copy.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = records.base_identity(str(copy))
    assert changed["base_fingerprint"] == first["base_fingerprint"]
    assert changed["base_hash"] != first["base_hash"]


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no adapter: none of adapter\.safetensors, .* is in it"):
        records.adapter_hash(str(tmp_path))


def keep(path: Path, answers: list[dict[str, str]], model: dict[str, object]) -> None:
    kept.Kept(path, model, ("id",), "answer", ()).add(answers)


def test_a_model_of_kept_answers_is_told_by_what_differs(tmp_path):
    path = tmp_path / "kept.jsonl"
    model = {"llama": "a", "dtype": "float32", "shots": []}
    keep(path, [{"id": "1", "answer": "x"}], model)
    assert [answer for answer, _ in kept.read_kept(path, [model], ("id", "answer"), "answer")] == [
        {"id": "1", "answer": "x"}
    ]
    with pytest.raises(ValueError, match="of another model") as caught:
        kept.read_kept(path, [{**model, "dtype": "bfloat16", "beams": 2}], ("id", "answer"), "answer")
    assert str(caught.value) == (
        f'{path} holds answers of another model (dtype "float32" there, "bfloat16" now; beams null there, 2 now); '
        "delete it or name another --out"
    )
    path.write_text('{"id": "1", "answer": "x", "model": 3}\n')
    with pytest.raises(ValueError, match="line 1 is no answer that this command kept"):
        kept.read_kept(path, [model], ("id", "answer"), "answer")


def test_the_model_whose_answers_a_file_holds(tmp_path):
    path, other = tmp_path / "kept.jsonl", tmp_path / "other.jsonl"
    keep(path, [{"id": "1"}, {"id": "2"}], {"llama": "a"})
    assert kept.scored_file(path, "id", ["1"])[0] == {"llama": "a"}
    keep(other, [{"id": "3"}], {"llama": "b"})
    path.write_text(path.read_text() + other.read_text())
    assert kept.scored_file(path, "id", ["1"])[0] is None, "two models"
    for text in ('{"id": "1"}\n', "[1, 2]", '{\n "results": {}\n}', "", "3\n", "[" * 100_000):
        path.write_text(text)
        assert kept.scored_file(path, "id", ["1"]) == (None, kept.Made(("unknown",))), text


def test_kept_answers_say_how_they_were_made(tmp_path, monkeypatch):
    """A resumed run is of two commits; its file said that all was made by the last, in the last leg's seconds."""
    path, model = tmp_path / "kept.jsonl", {"llama": "a", "sampling": {"beams": 1}}
    wanted = ["1", "2", "3", "4"]
    clock = iter([0.0, 8.0, 100.0, 103.0, 201.0])
    monkeypatch.setattr(kept.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(kept, "git_commit", lambda: "first")
    keep(path, [{"id": "1"}, {"id": "2"}], model)
    line = json.loads(path.read_text().splitlines()[0])
    assert line["made"].keys() == {"git_commit", "versions", "time", "seconds"}
    assert (line["made"]["git_commit"], line["made"]["seconds"]) == ("first", 4.0)
    assert line["made"]["versions"].keys() >= {"mmadapter", "torch", "numpy", "python"}
    with path.open("a") as file:  # as older files have it
        file.write(json.dumps({"id": "3", "model": {"llama": "a"}}) + "\n")
    monkeypatch.setattr(kept, "git_commit", lambda: "second")
    resumed = kept.Kept(path, model, ("id",), "answer", wanted)
    assert resumed.answers == {name: {"id": name} for name in wanted[:3]}
    resumed.add([{"id": "4"}])
    assert resumed.made == kept.Made(("first", "unknown", "second"), 8.0)
    assert kept.scored_file(path, "id", wanted) == (model, kept.Made(("first", "unknown", "second"), 11.0))
    assert kept.scored_file(path, "id", ["4"])[1] == kept.Made(("second",), 3.0)
    args = Namespace(seed=0)
    about = {"task": "x", "version": 1, "scores": {}, "settings": {}, "model": model, "data_hash": "d"}
    start = records.Start(200.0, "second")
    record = records.result_record(args, "c", start, **about, predictions=[], packages=(), made=resumed.made)
    assert record["answers_made_by"] == ["first", "unknown", "second"]
    assert record["seconds"] == 9.0


@pytest.mark.parametrize("run", [caption_run, qa_run, scienceqa_run, ner_run])
def test_answers_that_older_versions_kept_are_gone_on_with(run, tiny, tmp_path, monkeypatch):
    """They have no `made` and no `sampling`, and null for beams that are the adapter's own."""
    monkeypatch.setattr("eval.caption_metrics.java_version", lambda: None)
    monkeypatch.setattr(ner_texts, "INSTRUCTIONS", {"json": "List {types}"})
    command, options = run(tiny, tmp_path / "data")
    path, out = tmp_path / "kept.jsonl", tmp_path / "scores.json"
    adapter = tiny.sees if command is caption else tiny.reads
    arguments = [*options, *model_options(tiny, adapter), "--out", str(path), "--json", str(out)]
    assert command.main(arguments) == 0
    new = json.loads(path.read_text())
    old = {**new, "model": {name: value for name, value in new["model"].items() if name != "sampling"}}
    del old["made"]
    if command is caption:
        old["model"]["beams"] = None
    path.write_text(json.dumps(old) + "\n")
    assert command.main(arguments) == 0
    assert json.loads(path.read_text()) == old, "nothing was asked again"
    record = json.loads(out.read_text())
    assert record["answers_made_by"] == ["unknown"]
    assert record["model"] == new["model"]
    old["model"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(old) + "\n")
    assert command.main(arguments) == 1


def test_the_decoding_that_an_adapter_asks_for_is_recorded(tiny, tmp_path, monkeypatch):
    """Beams and length penalty of an adapter were null: only its own file told what they were."""
    monkeypatch.setattr("eval.caption_metrics.java_version", lambda: None)
    command, options = caption_run(tiny, tmp_path / "data")
    adapter, out = shutil.copytree(tiny.sees, tmp_path / "adapter"), tmp_path / "out.json"
    about = checkpoint.read_about(adapter / FILE_NAME)
    about = dataclasses.replace(about, generation={"beams": 2, "length_penalty": 0.5, "max_new_tokens": 3})
    checkpoint.save_adapter(adapter / FILE_NAME, load_file(adapter / FILE_NAME), about)
    session = mmadapter.load(llama=str(tiny.llama), adapter=str(adapter))
    for given, beams in (([], 2), (["--beams", "1"], 1)):
        assert command.main([*options, *model_options(tiny, adapter), "--json", str(out), *given]) == 0
        model = json.loads(out.read_text())["model"]
        assert model["beams"] == model["sampling"]["beams"] == beams
        assert model["sampling"] == records.decoding(session.sampling("caption", {"beams": beams}))
        assert (model["sampling"]["length_penalty"], model["sampling"]["max_new_tokens"]) == (0.5, 3)
        assert model["sampling"]["stop"] == ["\n"]


def test_pictures_are_known_by_their_content(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.caption_metrics.java_version", lambda: None)
    command, options = caption_run(tiny, tmp_path / "data")
    pictures, out = shutil.copytree(tiny.pictures, tmp_path / "pictures"), tmp_path / "out.json"
    options[-1] = str(pictures)
    found = []
    for adapter in (tiny.sees, tiny.sees, "none"):
        assert command.main([*options, *model_options(tiny, adapter), "--json", str(out)]) == 0
        found.append(json.loads(out.read_text())["images_hash"])
        shutil.copy(pictures / "1.png", pictures / "0.png")
    first = records.images_hash({"0.png": tiny.pictures / "0.png"})
    assert found == [first, records.images_hash({"0.png": tiny.pictures / "1.png"}), None], "the base sees none"
    both = {name: tiny.pictures / f"{name}.png" for name in ("0", "1")}
    assert records.images_hash(both) == records.images_hash(dict(reversed(both.items())))
    assert records.images_hash(both) != records.images_hash({"0": both["1"], "1": both["0"]})
    assert records.images_hash({}) is None


def test_the_pictures_of_questions_are_known_by_their_content(tiny, tmp_path):
    """Of two questions, one of them without a picture."""
    rows = [{"question": "Q?", "answer": "dog", "image": "0.png"}, {"question": "Q?", "answer": "dog"}]
    gold, out = written(tmp_path / "rows.json", rows), tmp_path / "out.json"
    options = ["--gold", str(gold), "--images", str(tiny.pictures), "--max-new-tokens", "1", "--json", str(out)]
    for adapter, digest in ((tiny.sees, records.images_hash({"0": tiny.pictures / "0.png"})), (tiny.reads, None)):
        assert qa.main([*options, *model_options(tiny, adapter)]) == 0
        assert json.loads(out.read_text())["images_hash"] == digest


@pytest.mark.parametrize("run", [caption_run, qa_run, scienceqa_run, instruct_run, ner_run])
def test_examples_in_a_file_of_their_own(run, tiny, tmp_path, monkeypatch, capsys):
    """The score file then has the name and the hash, and the report reads no other file in its place."""
    monkeypatch.setattr("eval.caption_metrics.java_version", lambda: None)
    monkeypatch.setattr(ner_texts, "INSTRUCTIONS", {"json": "List {types}"})
    command, options = run(tiny, tmp_path / "data")
    inside, out, examples = (tmp_path / name for name in ("inside.json", "scores.json", "rows.jsonl"))
    options += model_options(tiny, tiny.sees if command is caption else tiny.reads)
    assert command.main([*options, "--json", str(inside)]) == 0
    assert command.main([*options, "--json", str(out), "--examples", str(examples)]) == 0
    whole, record = json.loads(inside.read_text()), json.loads(out.read_text())
    assert [json.loads(line) for line in examples.read_text().splitlines()] == whole.pop("predictions")
    assert (record.pop("predictions_file"), record.pop("predictions_file_hash")) == (
        "rows.jsonl",
        file_sha256(examples),
    )
    assert record.keys() == whole.keys()
    [one], [other] = report_runs.read_runs([str(inside)]), report_runs.read_runs([str(out)])
    assert one.examples == other.examples
    examples.write_text(examples.read_text() + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl is not what .*scores\.json was written with"):
        report_runs.read_runs([str(out)])
    examples.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither rows\.jsonl nor predictions\.jsonl nor captions\.jsonl"):
        report_runs.read_runs([str(out)])
    for json_out, message in (([], "--examples goes with --json"), (["--json", str(examples)], "another file in the")):
        with pytest.raises(SystemExit):
            command.main([*options, *json_out, "--examples", str(examples)])
        assert message in capsys.readouterr().err


def test_a_scored_file_of_kept_answers_names_their_model(tiny, tmp_path):
    command, options = qa_run(tiny, tmp_path)
    kept, first, second = tmp_path / "kept.jsonl", tmp_path / "first.json", tmp_path / "second.json"
    assert command.main([*options, *model_options(tiny, tiny.reads), "--out", str(kept), "--json", str(first)]) == 0
    assert command.main([*options[:2], "--predictions", str(kept), "--json", str(second)]) == 0
    asked, scored = (json.loads(path.read_text()) for path in (first, second))
    for name in ("adapter", "adapter_hash", "base", "base_hash", "model", "predictions", "exact_match"):
        assert scored[name] == asked[name], name
    assert (asked["predictions_hash"], scored["predictions_hash"]) == (None, file_sha256(kept))


def test_shots_and_seed_are_those_that_the_answers_were_made_with(tiny, tmp_path):
    """Scoring the file that `--shots 1 --seed 5` kept once said shots 0 and seed 0."""
    command, options = qa_run(tiny, tmp_path)
    kept, out = tmp_path / "kept.jsonl", tmp_path / "out.json"
    asked = ["--shots", "1", "--seed", "5", "--out", str(kept)]
    assert command.main([*options, *model_options(tiny, "none"), *asked]) == 0
    score = [*options[:2], "--predictions", str(kept), "--json", str(out)]
    assert command.main(score) == 0
    assert [json.loads(out.read_text())[name] for name in ("shots", "seed")] == [1, 5]
    line = json.loads(kept.read_text())
    del line["model"]["seed"]  # as older files have it
    kept.write_text(json.dumps(line))
    assert command.main(score) == 0
    assert [json.loads(out.read_text())[name] for name in ("shots", "seed")] == [1, None]


def test_the_seed_of_a_score_is_the_one_that_chose_what_is_scored(tiny, tmp_path):
    """Of ScienceQA the seed also holds rows out, and draws answers: then it is this command's, whoever was asked."""
    command, options = scienceqa_run(tiny, tmp_path)
    kept, out = tmp_path / "kept.jsonl", tmp_path / "out.json"
    asked = ["--shots", "1", "--seed", "5", "--out", str(kept)]
    assert command.main([*options, *model_options(tiny, "none"), *asked]) == 0
    for more, seed in (([], 5), (["--on-unparsed", "random", "--seed", "2"], 2)):
        assert command.main([*options[:2], "--predictions", str(kept), "--json", str(out), *more]) == 0
        found = json.loads(out.read_text())
        assert (found["seed"], found["shots"]) == (seed, 1)


def test_a_changed_tree_is_not_its_commit(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *names, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    source = tmp_path / "mmadapter" / "record.py"
    source.parent.mkdir()
    source.write_text("1\n")
    monkeypatch.setattr(record_module, "__file__", str(source))
    assert record_module.git_commit() is None
    git("init", "-q")
    assert record_module.git_commit() is None
    git("add", ".")
    git("commit", "-q", "-m", "one")
    (tmp_path / "untracked").touch()
    assert record_module.git_commit() == git("rev-parse", "HEAD")
    source.write_text("2\n")
    assert record_module.git_commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setattr(record_module, "__file__", str(tmp_path / "mmadapter" / "deeper" / "record.py"))
    assert record_module.git_commit() is None, "another repository's"


def test_a_record_of_a_command_without_a_model(tmp_path):
    args = Namespace(seed=4, predictions=written(tmp_path / "p.json", []), limit=2)
    record = records.result_record(
        args,
        "python -m eval.x",
        records.Start.now(),
        task="x",
        version=7,
        scores={"f1": 3.0},
        settings={"split": "dev", "limit": None},
        model=None,
        data_hash="d",
        predictions=[],
        packages=("pytest",),
        java="17",
    )
    assert list(record)[:3] == ["f1", "task", "version"]
    assert [name for name in FIELDS if name not in record] == []
    assert (record["split"], record["limit"], record["shots"], record["adapter"]) == ("dev", None, 0, None)
    assert record["versions"].keys() >= {"python", "torch", "pytest", "java"}


def test_what_is_no_file_is_written_to_itself_and_a_link_stays_one(tmp_path: Path) -> None:
    """A device or a pipe in the place of a result file must not become one."""
    pipe, real, link = tmp_path / "pipe", tmp_path / "real.json", tmp_path / "link.json"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"n": 1})
    assert json.loads(os.read(reader, 100)) == {"n": 1}
    os.close(reader)
    assert pipe.is_fifo()
    real.write_text("{}")
    link.symlink_to(real.name)
    write_json(link, {"n": 2})
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"n": 2}
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/scores.json", "file is no folder; give another path"),
        (".", "is a folder; give a file name"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused_at_the_start(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message):
        records.prepare_outputs(tmp_path / name)
    records.prepare_outputs(tmp_path / "new" / "scores.json", None)
    assert (tmp_path / "new").is_dir()
