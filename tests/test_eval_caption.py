"""Caption data sets, the caption scores, and the options that command lines share."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmadapter
from eval import caption as command
from eval import caption_metrics
from eval.caption_sums import caption_sums
from mmadapter import options
from mmadapter.captions import CaptionedImage, image_path, match_predictions, read_captions

needs_java = pytest.mark.skipif(caption_metrics.java_version() is None, reason="no working java on PATH")

# Three photos; sentences with what tokenizers stumble over: clitics, brackets, quotes, accents, a stray line break.
SENTENCES = {
    1: ["A dog isn't on the grass.", "The dog runs (fast) on green grass ."],
    2: ['Two café tables, a "red" chair and a tri-colored cat', "A cat sleeps\nunder a table."],
    3: ["A man rides a wave on a surfboard.", "The man's surfing; a big wave is behind him"],
}
CAPTIONS = {1: "A dog runs on the grass.", 2: "A cat is under\u2028the table", 3: "a man's on a big wave"}


def coco_file(folder: Path) -> Path:
    path = folder / "captions.json"
    content = {
        "info": {},
        "images": [{"id": key, "file_name": f"{key:012}.jpg"} for key in SENTENCES],
        "annotations": [
            {"id": 10 * key + number, "image_id": key, "caption": text}
            for key, texts in SENTENCES.items()
            for number, text in enumerate(texts)
        ],
    }
    path.write_text(json.dumps(content))
    return path


def karpathy_file(folder: Path, **changes: object) -> Path:
    """Photos 1 and 2 of split test and 3 of train, as in Karpathy's COCO (cocoid, filepath)."""
    path = folder / "dataset_tiny.json"
    images = [
        {
            "imgid": key - 1,
            "cocoid": key,
            "filepath": "val2014",
            "filename": f"{key}.jpg",
            "split": "train" if key == 3 else "test",
            "sentences": [{"raw": text} for text in texts],
        }
        for key, texts in SENTENCES.items()
    ]
    images[0].update(changes)
    path.write_text(json.dumps({"dataset": "tiny", "images": images}))
    return path


def lines_file(folder: Path, records: list[dict]) -> Path:
    path = folder / "predictions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def coco_results(folder: Path, captions: dict = CAPTIONS) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps([{"image_id": key, "caption": text} for key, text in captions.items()]))
    return path


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    """A PATH without java: quick, and the same on every machine."""
    monkeypatch.setenv("PATH", str(tmp_path))
    caption_metrics.java_version.cache_clear()
    yield
    caption_metrics.java_version.cache_clear()


@pytest.fixture
def fake_java(monkeypatch, tmp_path):
    """Put a Python program in java's place: `fake_java(source)`."""

    def install(source: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "java").write_text(f"#!{sys.executable}\n{source}")
        (folder / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return install


class FakeSession:
    """Captions a picture with its file name, and remembers what it was asked."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.examples: list[list[str] | None] = []
        self.fail_after = fail_after
        self.llama = object()

    def caption(self, images, *, batch_size=32, beams=None, examples=None):
        self.examples.append(examples)
        if self.fail_after is not None and len(self.asked) + len(images) > self.fail_after:
            raise KeyboardInterrupt
        self.asked += [Path(image).name for image in images]
        return [f"a photo called {Path(image).stem}" for image in images]


@pytest.fixture
def _model_is_known(monkeypatch):
    """For a `FakeSession`, which has no weights to hash."""
    monkeypatch.setattr(command, "model_identity", lambda args: {"llama": args.llama, "adapter": args.adapter})
    monkeypatch.setattr(command, "task_decoding", lambda adapter, task, given: {"beams": 1})


@pytest.fixture
def pictures(tmp_path, _model_is_known):
    folder = tmp_path / "images"
    (folder / "val2014").mkdir(parents=True)
    for key in SENTENCES:
        (folder / "val2014" / f"{key}.jpg").touch()
        (folder / f"{key:012}.jpg").touch()
    return folder


# Annotations


def test_coco_annotations(tmp_path):
    """The stray line break within a sentence must be gone: line-based tools would shift all later sentences."""
    images = read_captions(coco_file(tmp_path))
    assert [image.image_id for image in images] == [1, 2, 3]
    assert images[1] == CaptionedImage(
        2, "000000000002.jpg", (SENTENCES[2][0], "A cat sleeps under a table."), split=None
    )


def test_karpathy_annotations(tmp_path):
    path = karpathy_file(tmp_path)
    images = read_captions(path, "test")
    assert [(image.image_id, image.file_name, image.split) for image in images] == [
        (1, "val2014/1.jpg", "test"),
        (2, "val2014/2.jpg", "test"),
    ]
    assert len(read_captions(path)) == 3


def test_karpathy_without_cocoid_counts_by_imgid(tmp_path):
    path = tmp_path / "flickr.json"
    image = {"imgid": 7, "filename": "a.jpg", "split": "val", "sentences": [{"raw": "A dog."}]}
    path.write_text(json.dumps({"images": [image]}))
    assert read_captions(path) == [CaptionedImage(7, "a.jpg", ("A dog.",), "val")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is not JSON"),
        ("[1, 2]", "no list of images"),
        ('{"images": []}', "no list of images"),
        ('{"images": [{"id": 1, "file_name": "a"}]}', "neither annotations .COCO. nor sentences"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', r"1 image \(a\) without captions"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 5, "caption": "x"}]}',
            "image id 5, which is not among the 1 images",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}',
            r"annotations\[0\] needs caption",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}],'
            '"annotations": [{"image_id": 1, "caption": "x"}]}',
            "image id 1 stands there 2 times",
        ),
    ],
)
def test_bad_annotations(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_captions(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentences": []}, r"1 image \(val2014/1.jpg\) without captions"),
        ({"sentences": "A dog."}, "must be a list"),
        ({"split": None}, r"images\[0\] needs split"),
        ({"filename": 3}, "needs filename"),
        ({"cocoid": 2}, "image id 2 stands there 2 times"),
    ],
)
def test_bad_karpathy_images(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_captions(karpathy_file(tmp_path, **changes))


def test_missing_annotations_and_splits(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.json"):
        read_captions(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is a folder"):
        read_captions(tmp_path)
    with pytest.raises(ValueError, match="no split 'dev': it has test, train"):
        read_captions(karpathy_file(tmp_path), "dev")
    with pytest.raises(ValueError, match="COCO annotations have none"):
        read_captions(coco_file(tmp_path), "test")


def test_image_path(pictures):
    image = CaptionedImage(1, "val2014/1.jpg", ("x",), None)
    assert image_path(pictures, image) == pictures / "val2014" / "1.jpg"
    assert image_path(pictures / "val2014", image) == pictures / "val2014" / "1.jpg"
    with pytest.raises(FileNotFoundError, match=r"no picture val2014/9\.jpg"):
        image_path(pictures, CaptionedImage(9, "val2014/9.jpg", ("x",), None))


@pytest.mark.data
def test_real_data_sets():
    if "MMADAPTER_DATA" not in os.environ:
        pytest.skip("MMADAPTER_DATA does not name the data folder")
    data = Path(os.environ["MMADAPTER_DATA"])
    flickr = data / "flickr8k" / "dataset_flickr8k.json"
    assert [len(read_captions(flickr, split)) for split in ("train", "val", "test")] == [6000, 1000, 1000]
    coco = read_captions(data / "coco" / "annotations" / "captions_sample.json")
    assert (len(coco), sum(len(image.captions) for image in coco)) == (297, 1485)
    assert all(image_path(data / "coco" / "val2017", image).is_file() for image in coco)


# Predictions


def test_json_lines_match_by_file_name_and_a_later_caption_beats_an_error(tmp_path):
    known = read_captions(karpathy_file(tmp_path))
    records = [
        {"image": "some/folder/2.jpg", "error": "truncated"},
        {"image": "C:\\photos\\1.jpg", "caption": " a  dog\n"},
        {"image": "3.jpg", "caption": "not scored"},
        {"image": "some/folder/2.jpg", "caption": "a cat"},
    ]
    assert match_predictions(lines_file(tmp_path, records), known[:2], known) == (["a dog", "a cat"], 1)


def test_coco_results_come_back_in_the_order_of_the_images(tmp_path):
    known = read_captions(coco_file(tmp_path))
    path = coco_results(tmp_path, {"3": "c", 1: "a", 2: "b"})
    assert match_predictions(path, known, known) == (["a", "b", "c"], 0)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"image": "1.jpg", "caption": "a"}], r"1 image \(2 val2014/2.jpg\) without a caption, of 2"),
        (
            [{"image": "1.jpg", "caption": "a"}, {"image": "2.jpg", "error": "no such\nfile"}],
            r"2.jpg \(no such file\)\) without a caption",
        ),
        (
            [{"image": n, "caption": "a"} for n in ("1.jpg", "x/1.jpg", "2.jpg")],
            r"1 image \(1.jpg\) with more than one",
        ),
        (
            [{"image": f"{n}.png", "caption": "a"} for n in range(5)],
            r"5 images \(0.png, 1.png, 2.png, ...\) not in the",
        ),
        ([{"image_id": 99, "caption": "a"}], r"image_id 99\) not in the annotations"),
        ([{"image_id": 1, "caption": None}], "line 1: caption must be text, got None"),
        ([{"caption": "a"}], "line 1: expected image_id or image"),
        (["1.jpg"], "line 1: expected COCO results"),
        ([], "holds no predictions"),
    ],
)
def test_bad_predictions(tmp_path, records, message):
    known = read_captions(karpathy_file(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        match_predictions(lines_file(tmp_path, records), known[:2], known)
    assert "\n" not in str(caught.value)


def test_predictions_that_are_not_json_or_ambiguous(tmp_path):
    known = read_captions(karpathy_file(tmp_path))
    path = tmp_path / "predictions.txt"
    path.write_text('{"image": "1.jpg", "capt')
    with pytest.raises(ValueError, match="is not JSON"):
        match_predictions(path, known, known)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        match_predictions(tmp_path / "none", known, known)
    twins = [CaptionedImage(1, "a/x.jpg", ("x",), None), CaptionedImage(2, "b/x.jpg", ("x",), None)]
    with pytest.raises(ValueError, match=r"2 images are called x\.jpg"):
        match_predictions(lines_file(tmp_path, [{"image": "a/x.jpg", "caption": "a"}]), twins, twins)


# Scores


@needs_java
def test_scores_equal_pycocoevalcap_itself(tmp_path, monkeypatch, capfd):
    """Ours on the same two files, to the last bit; standard output stays ours and no Java process stays behind."""
    from pycocoevalcap import eval as reference
    from pycocotools.coco import COCO

    class NoSpice:  # the real one would download its models
        def compute_score(self, gts, res):
            return 0.0, [0.0] * len(gts)

        def method(self):
            return "SPICE"

    monkeypatch.setattr(reference, "Spice", NoSpice)
    annotations = coco_file(tmp_path)
    # pycocoevalcap itself reads a sentence that another line separator splits as two, and moves all the later ones.
    predictions = coco_results(tmp_path, {key: text.replace("\u2028", " ") for key, text in CAPTIONS.items()})
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO(str(annotations))
        judge = reference.COCOEvalCap(gold, gold.loadRes(str(predictions)))
        judge.evaluate()
    capfd.readouterr()

    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kw: started.append(popen(*args, **kw)) or started[-1])
    out = tmp_path / "scores.json"
    status = command.main(
        ["--annotations", str(annotations), "--predictions", str(coco_results(tmp_path)), "--json", str(out)]
    )
    printed = capfd.readouterr()
    assert status == 0, printed.err
    assert started
    assert all(process.poll() is not None for process in started)

    scores = json.loads(out.read_text())
    for metric in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"):
        assert scores[metric] == float(judge.eval[metric]) > 0, metric
    for metric in ("METEOR", "ROUGE_L", "CIDEr"):
        assert [example[metric] for example in scores["predictions"]] == [
            float(judge.imgToEval[key][metric]) for key in SENTENCES
        ]
    assert scores["predictions"][0][
        "BLEU"
    ] == {  # a dog runs on the grass; of its pairs of words only "runs on" is in no reference
        **{"matched": [6, 4, 1, 0], "total": [6, 5, 4, 3], "length": 6, "reference_length": 7}
    }
    assert caption_sums(scores["predictions"])["METEOR"].value == pytest.approx(scores["METEOR"])
    assert scores["tokenizer"] == "ptb"
    assert printed.out.startswith("captions.json: 3 images, 6 references\n  Bleu_1 ")
    assert len(printed.out.splitlines()) == 9
    assert "PTBTokenizer" not in printed.err


def summed(scores: caption_metrics.CaptionScores, *images: int) -> dict[str, float]:
    """What `eval.report` makes of the images' counts."""
    return {name: own.value for name, own in caption_sums([scores.of_image[place] for place in images]).items()}


def test_images_add_up_to_every_score(no_java):
    """Of any of the images, in any order: so a bootstrap may draw them anew. Nothing matches in the last two."""
    references = [*SENTENCES.values(), ["a dog runs"], ["a cat sleeps"], ["two men walk on sand"]]
    captions = [*CAPTIONS.values(), "a dog runs", "zzz qqq", ""]
    scores = caption_metrics.score_captions(references, captions)
    for images in ((0, 1, 2, 3, 4, 5), (3, 0), (2, 4), (5, 1, 1, 3), (4, 5)):
        part = caption_metrics.score_captions([references[n] for n in images], [captions[n] for n in images])
        made = summed(scores, *images)
        assert made.keys() == {name for name, value in part.metrics.items() if value is not None}
        for name in made.keys() - {"CIDEr"}:  # it weighs words by the references of the whole set
            assert made[name] == pytest.approx(part.metrics[name], abs=1e-9), (name, images)
    assert all(own.value == pytest.approx(scores.metrics[name]) for name, own in caption_sums(scores.of_image).items())


# Of METEOR 1.5 itself: its line about a caption and its score. "a dog runs" is its own reference, in nothing does the
# fifth match, the sixth has an empty reference.
METEOR_LINES = [
    ("6 8 3 5 2 2 3 3 0 0 0 0 0 0 0 0 1 0 0 1 2 6 6", 0.36860804476007936),
    ("7 6 3 2 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 2 2 2", 0.11307420494699648),
    ("8 5 5 2 2 2 2 2 0 0 0 0 0 0 0 0 0 0 0 0 3 4 4", 0.3029152791078141),
    ("3 3 1 1 2 2 1 1 0 0 0 0 0 0 0 0 0 0 0 0 1 3 3", 1.0),
    ("2 2 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", 0.0),
    ("2 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", 0.0),
]


@pytest.mark.parametrize(
    ("images", "score"),
    [
        *(((number,), score) for number, (_, score) in enumerate(METEOR_LINES)),
        (range(6), 0.2726875168944803),
        ((0, 3), 0.4499476200093007),  # the one chunk of a caption that is its reference is not in the sum
        ((3, 4), 0.6194690265486725),
        ((4, 5), 0.0),
    ],
)
def test_meteor_of_its_statistics(images, score):
    examples = [{"METEOR_statistics": METEOR_LINES[number][0]} for number in images]
    assert caption_sums(examples)["METEOR"].value == pytest.approx(score, abs=1e-12)


@needs_java
def test_plain_tokens_follow_the_ptb_tokenizer():
    sentences = [*SENTENCES.values(), ["", "They don't see the boys' $5 hats... it's 8:30", "1,000 dogs [sic]"]]
    ptb = caption_metrics.ptb_tokens(sentences)
    assert caption_metrics.plain_tokens(sentences) == ptb
    assert ptb[0] == ["a dog is n't on the grass", "the dog runs -lrb- fast -rrb- on green grass"]


@needs_java
@pytest.mark.parametrize("separator", ["\r", "\n", "\x0b", "\x85", "\u2028"])
def test_a_line_separator_does_not_move_later_sentences(separator):
    tokens = caption_metrics.ptb_tokens([[f"one{separator}two"], ["three"]])
    assert tokens == [["one two"], ["three"]]


def test_a_broken_tokenizer_is_an_error(fake_java):
    fake_java("import sys\nsys.exit('Error: could not reserve memory')")
    with pytest.raises(ValueError, match="Java said: Error: could not reserve memory"):
        caption_metrics.ptb_tokens([["a dog"]])


def test_a_dead_meteor_is_left_out(fake_java):
    """pycocoevalcap then waits for ever on its own lock, when the object is deleted."""
    fake_java("import sys\nsys.exit('Could not reserve enough space')")
    with pytest.raises(caption_metrics.MetricUnavailableError, match="Could not reserve enough space"):
        caption_metrics.meteor({0: ["a dog"]}, {0: ["a dog"]})


@pytest.fixture
def spice_models(monkeypatch, tmp_path):
    """SPICE as if its models were installed, with its temporary files in the test's folder."""
    from pycocoevalcap.spice import get_stanford_models, spice

    for suffix in ("", "-models"):
        (tmp_path / f"{get_stanford_models.JAR}{suffix}.jar").touch()
    monkeypatch.setattr(get_stanford_models, "SPICELIB", str(tmp_path))
    monkeypatch.setattr(spice, "TEMP_DIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(spice, "CACHE_DIR", str(tmp_path / "cache"))


def test_spice_with_its_models(spice_models, fake_java, capfd, monkeypatch):
    """Its Java program gets the packages opened that Java 17 closes, and says nothing on our standard output."""
    monkeypatch.delenv("JDK_JAVA_OPTIONS", raising=False)
    fake_java(
        "import json, os, sys\n"
        "assert '--add-opens=java.base/java.lang=ALL-UNNAMED' in os.environ['JDK_JAVA_OPTIONS']\n"
        "print('Parsing reference captions')\n"
        "rows = json.load(open(sys.argv[4]))\n"
        "rows = [{'image_id': r['image_id'], 'scores': {'All': {'f': 0.25 * r['image_id']}}} for r in rows]\n"
        "json.dump(rows, open(sys.argv[sys.argv.index('-out') + 1], 'w'))\n"
    )
    sentences = {0: ["a dog"], 1: ["a cat"], 2: ["a man"]}
    assert caption_metrics.spice(sentences, sentences) == (0.25, [{"SPICE": 0.0}, {"SPICE": 0.25}, {"SPICE": 0.5}])
    assert capfd.readouterr().out == ""
    assert "JDK_JAVA_OPTIONS" not in os.environ


def test_spice_that_fails_is_left_out(spice_models, fake_java):
    fake_java(
        "import sys\nsys.exit('Exception in thread \"main\": out of memory\\n\\tat edu.anu.Spice\\n\\t... 7 more')"
    )
    with pytest.raises(caption_metrics.MetricUnavailableError, match='said: Exception in thread "main": out of memory'):
        caption_metrics.spice({0: ["a dog"]}, {0: ["a dog"]})


def test_spice_without_models_is_left_out_and_nothing_is_downloaded(monkeypatch, tmp_path):
    from pycocoevalcap.spice import get_stanford_models

    monkeypatch.setattr(get_stanford_models, "SPICELIB", str(tmp_path))
    monkeypatch.setattr(get_stanford_models, "urlretrieve", lambda *_, **__: pytest.fail("tried to download"))
    with pytest.raises(caption_metrics.MetricUnavailableError, match=r"download them with: python -m pycocoevalcap"):
        caption_metrics.spice({0: ["a dog"]}, {0: ["a dog"]})


def test_without_java_the_run_goes_on_and_says_what_is_missing(tmp_path, no_java, capsys):
    out = tmp_path / "new folder" / "scores.json"
    arguments = ["--annotations", str(karpathy_file(tmp_path)), "--json", str(out)]
    arguments += ["--predictions", str(coco_results(tmp_path))]
    assert command.main(arguments) == 0
    scores = json.loads(out.read_text())
    assert scores["METEOR"] is None
    assert scores["SPICE"] is None
    assert set(scores["left_out"]) == {"METEOR", "SPICE"}
    assert scores["tokenizer"] == "plain"
    assert scores["versions"]["java"] is None
    assert 0 < scores["Bleu_1"] < 1
    printed = capsys.readouterr()
    assert (
        "METEOR is left out: it needs Java, and there is no working java on PATH; install a Java runtime, such as "
        "Debian's default-jre-headless\nSPICE is left out: it needs Java"
    ) in printed.err
    assert "1 captions of images that are not scored here are passed over" in printed.err
    assert "METEOR   left out" in printed.out


def test_json_record(tmp_path, no_java):
    annotations, predictions, out = karpathy_file(tmp_path), coco_results(tmp_path), tmp_path / "out.json"
    out.write_text("an older file")
    arguments = ["--annotations", str(annotations), "--predictions", str(predictions), "--json", str(out)]
    assert command.main(arguments) == 0
    scores = json.loads(out.read_text())
    assert list(scores)[:8] == list(caption_metrics.METRICS)
    assert {key: scores[key] for key in ("n", "references", "split", "task", "version", "model")} == {
        "n": 2,
        "references": 4,
        "split": "test",
        "task": "caption",
        "version": 1,
        "model": None,
    }
    assert scores["command"].startswith("python -m eval.caption --annotations ")
    assert scores["data_hash"] == command.file_sha256(annotations)
    assert scores["predictions_hash"] == command.file_sha256(predictions)
    assert (scores["adapter"], scores["base_hash"]) == (None, None)
    assert scores["versions"]["pycocoevalcap"]
    assert "pillow" not in scores["versions"]
    assert {"time", "git_commit", "seconds", "seed"} <= set(scores)
    first = scores["predictions"][0]
    assert (first["image"], first["caption"]) == ("val2014/1.jpg", CAPTIONS[1])
    assert "references" not in first, "the data set is not copied into results"
    assert scores["CIDEr"] == pytest.approx(sum(example["CIDEr"] for example in scores["predictions"]) / 2)
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.json"]


def test_a_result_that_cannot_be_written_leaves_the_older_one(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("an older file")
    with pytest.raises(TypeError):
        command.write_result(argparse.Namespace(json=out, examples=None), {"CIDEr": object()})
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older file"]


def test_perfect_and_empty_captions(no_java):
    references = [["a dog runs on grass", "a dog"], ["two cats sleep on a bed"], ["a man rides a wave"]]
    perfect = caption_metrics.score_captions(references, [group[0] for group in references])
    assert perfect.metrics["Bleu_4"] == pytest.approx(1)
    assert perfect.metrics["ROUGE_L"] == pytest.approx(1)
    assert perfect.of_image[1]["CIDEr"] == pytest.approx(10)
    assert perfect.metrics["CIDEr"] == pytest.approx(sum(own["CIDEr"] for own in perfect.of_image) / 3)
    empty = caption_metrics.score_captions(references, ["", "", ""])
    assert empty.metrics["ROUGE_L"] == empty.metrics["CIDEr"] == 0


def test_limit_and_the_split_of_coco_annotations(tmp_path, no_java, capsys):
    arguments = ["--annotations", str(coco_file(tmp_path)), "--predictions", str(coco_results(tmp_path))]
    assert command.main([*arguments, "--split", "test", "--limit", "2"]) == 0
    printed = capsys.readouterr()
    assert "captions.json: 2 images, 4 references" in printed.out
    assert "have no splits: all of it is scored" in printed.err


# The model's captions


def model_arguments(folder: Path, pictures: Path, *more: str) -> list[str]:
    return ["--annotations", str(coco_file(folder)), "--adapter", "none", "--images", str(pictures), *more]


def test_model_run(tmp_path, pictures, no_java, monkeypatch):
    session, loaded, packed = FakeSession(), [], []
    monkeypatch.setattr(mmadapter, "load", lambda **settings: loaded.append(settings) or session, raising=False)
    monkeypatch.setattr("mmadapter.packed.pack", packed.append)
    out = tmp_path / "out.json"
    more = ["--json", str(out), "--dtype", "float32", "--gate", "identity", "--prompt-length", "3"]
    assert command.main(model_arguments(tmp_path, pictures, *more)) == 0
    assert loaded == [
        {
            "llama": "smollm2-135m",
            "adapter": None,
            "vision": None,
            "device": "cpu",
            "dtype": "float32",
            "prompt_length": 3,
            "gate": "identity",
        }
    ]
    assert packed == [session.llama]
    scores = json.loads(out.read_text())
    assert scores["predictions"][1]["caption"] == "a photo called 000000000002"
    assert scores["model"]["adapter"] == "none"
    assert scores["versions"]["pillow"]
    assert "open_clip_torch" in scores["versions"]


@pytest.mark.parametrize("torn", [b'{"im', b'{"image": "000000000002.jpg", "caption": "caf\xc3'])  # within a character
def test_a_stopped_run_goes_on_from_its_predictions(torn, tmp_path, pictures, no_java, monkeypatch, capsys):
    """Resumed equals uninterrupted, also where the file ends within a line."""
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    monkeypatch.setattr(command, "load_session", lambda args: FakeSession())
    assert command.main(model_arguments(tmp_path, pictures, "--out", str(whole))) == 0
    first, *_ = whole.read_bytes().splitlines(keepends=True)
    resumed.write_bytes(first + torn)

    session = FakeSession()
    monkeypatch.setattr(command, "load_session", lambda args: session)
    capsys.readouterr()
    assert command.main(model_arguments(tmp_path, pictures, "--out", str(resumed))) == 0
    assert session.asked == ["000000000002.jpg", "000000000003.jpg"]
    files = [[json.loads(line) for line in path.read_bytes().splitlines()] for path in (resumed, whole)]
    made = [line.pop("made") for lines in files for line in lines]
    assert len({one["git_commit"] for one in made}) == 1
    assert files[0] == files[1]
    assert "1 of 3 captions are in" in capsys.readouterr().err
    # What is kept is also what --predictions reads.
    known = read_captions(coco_file(tmp_path))
    assert match_predictions(resumed, known, known)[0][2] == "a photo called 000000000003"


def test_what_is_done_before_an_interruption_is_kept(tmp_path, pictures, monkeypatch, capsys):
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(10)]
    for image in images:
        (pictures / image["file_name"]).touch()
    annotations = [{"image_id": n, "caption": "x"} for n in range(10)]
    path, out = tmp_path / "ten.json", tmp_path / "kept.jsonl"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    monkeypatch.setattr(command, "load_session", lambda args: FakeSession(fail_after=8))
    arguments = ["--annotations", str(path), "--adapter", "a", "--images", str(pictures), "--batch-size", "1"]
    assert command.main([*arguments, "--out", str(out)]) == 130
    assert len(out.read_text().splitlines()) == 8
    assert capsys.readouterr().err.endswith("error: interrupted\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": "a.jpg", "caption": "x"}\n', "line 1 is no caption that this command kept"),
        ("precious notes without an end of line", "last line is no caption that this command kept"),
        ('{"image": "a", "caption": "x", "model": {"adapter": "b"}}\n', "captions of another model"),
    ],
)
def test_other_predictions_are_not_taken_over_or_harmed(tmp_path, pictures, content, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_session", lambda args: pytest.fail("loaded a model"))
    out = tmp_path / "kept.jsonl"
    out.write_text(content)
    assert command.main(model_arguments(tmp_path, pictures, "--out", str(out))) == 1
    assert message in capsys.readouterr().err
    assert out.read_text() == content


def test_shots_are_captions_of_train_photos(tmp_path, pictures, no_java, monkeypatch, capsys):
    session = FakeSession()
    monkeypatch.setattr(command, "load_session", lambda args: session)
    arguments = ["--annotations", str(karpathy_file(tmp_path)), "--adapter", "none", "--images", str(pictures)]
    assert command.main([*arguments, "--shots", "1", "--seed", "4"]) == 0
    assert session.examples[0][0] in SENTENCES[3]
    assert command.main([*arguments, "--shots", "2"]) == 1
    message = "--shots 2 takes captions of as many train photos that are not scored, and "
    more = "of them; give annotations that have with --train\n"
    assert f"error: {message}{arguments[1]} has 1 {more}" in capsys.readouterr().err
    for path, split in ((arguments[1], ["--split", "train"]), (str(coco_file(tmp_path)), [])):
        arguments[1] = path
        assert command.main([*arguments, *split, "--shots", "1"]) == 1
        assert f"{path} has 0 {more}" in capsys.readouterr().err
    # COCO annotations have no splits: another file is for training, but for the photos that are scored.
    arguments += ["--limit", "2", "--train", str(coco_file(tmp_path))]
    assert command.main([*arguments, "--shots", "1"]) == 0
    assert session.examples[-1][0] in SENTENCES[3]
    assert command.main([*arguments, "--shots", "2"]) == 1
    assert f"{arguments[-1]} has 1 {more}" in capsys.readouterr().err


def test_a_missing_scorer_is_reported_before_the_model_is_loaded(tmp_path, pictures, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setattr(command, "load_session", lambda args: pytest.fail("loaded a model"))
    assert command.main(model_arguments(tmp_path, pictures)) == 1
    assert "run: pip install pycocoevalcap" in capsys.readouterr().err


def test_a_missing_picture_is_named_before_the_model_is_loaded(tmp_path, pictures, monkeypatch, capsys):
    (pictures / "000000000002.jpg").unlink()
    monkeypatch.setattr(command, "load_session", lambda args: pytest.fail("loaded a model"))
    assert command.main(model_arguments(tmp_path, pictures)) == 1
    assert "error: there is no picture 000000000002.jpg" in capsys.readouterr().err


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --predictions FILE or --adapter A"),
        (["--predictions", "p", "--adapter", "a", "--images", "i"], "give either"),
        (["--adapter", "a"], "--adapter and --images go together"),
        (["--predictions", "p", "--images", "i"], "--adapter and --images go together"),
        (["--predictions", "p", "--out", "o"], "--out is about a model that answers"),
        (["--predictions", "p", "--shots", "0"], "--shots is about a model that answers; it goes with --adapter"),
        (["--predictions", "p", "--limit", "0"], "--limit must be at least 1"),
        (["--adapter", "a", "--images", "i", "--beams", "0"], "--beams must be at least 1"),
        (["--adapter", "a", "--images", "i", "--shots", "4"], "invalid choice: 4"),
    ],
)
def test_misuse_exits_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--annotations", "a.json", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_errors_are_one_line(tmp_path, capsys):
    assert command.main(["--annotations", str(tmp_path / "none.json"), "--predictions", "p"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: there is no file")
    with pytest.raises(FileNotFoundError):
        command.main(["--annotations", str(tmp_path / "none.json"), "--predictions", "p", "--debug"])


def test_a_folder_for_a_result_is_refused_at_once(tmp_path, capsys):
    arguments = ["--annotations", str(tmp_path / "none.json"), "--predictions", "p", "--json", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "is a folder; give a file name" in capsys.readouterr().err


def test_help_opens_with_an_example_and_imports_no_torch():
    """`--help` has to answer at once: neither the options nor the scorers may be imported for it."""
    code = (
        "import sys\nfrom eval.caption import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'pycocoevalcap', 'torch'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    root = Path(command.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("python -m eval.caption --annotations")


# Options that all commands share


def test_model_options_and_their_defaults():
    parser = argparse.ArgumentParser()
    options.add_model_options(parser)
    assert vars(parser.parse_args([])) == {
        "llama": "smollm2-135m",
        "adapter": None,
        "vision": None,
        "device": "cpu",
        "dtype": "auto",
        "prompt_length": 10,
        "gate": "tanh",
        "debug": False,
    }


def test_resolve_dtype(monkeypatch):
    assert options.resolve_dtype("float32", "cuda") is torch.float32
    assert options.resolve_dtype("bfloat16", "cpu") is torch.bfloat16
    assert options.resolve_dtype("auto", "cuda:1") is torch.bfloat16
    assert options.resolve_dtype("auto", "mps") is torch.float32
    for able, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(options, "cpu_computes_bfloat16", lambda able=able: able)
        assert options.resolve_dtype("auto", "cpu") is expected
    with pytest.raises(ValueError, match="unknown dtype 'half'; choose auto, float32, bfloat16, int8 or int4"):
        options.resolve_dtype("half", "cpu")


def test_cpu_computes_bfloat16(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    assert not options.cpu_computes_bfloat16(cpuinfo)
    cpuinfo.write_text("flags\t\t: fpu avx512f avx512_bf16_else\n")
    assert not options.cpu_computes_bfloat16(cpuinfo)
    for flag in ("avx512_bf16", "amx_bf16"):
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flag} avx2\n")
        assert options.cpu_computes_bfloat16(cpuinfo)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\nlines"), 1, "error: two lines\n"),
        (FileNotFoundError("there is no file x"), 1, "error: there is no file x\n"),
        (ConnectionError("the hub is out of reach"), 1, "error: the hub is out of reach\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (KeyError("a"), 1, "error: KeyError: 'a' (run again with --debug to see where)\n"),
    ],
)
def test_main_with_errors(error, status, line, capsys):
    def run():
        raise error

    assert options.main_with_errors(run, debug=False) == status
    assert capsys.readouterr().err == line
    with pytest.raises(type(error)):
        options.main_with_errors(run, debug=True)
    assert options.main_with_errors(lambda: 7, debug=False) == 7


def test_a_reader_that_has_seen_enough_is_no_error():
    """`... | head -1` must end without a message, also when the interpreter flushes at exit."""
    code = (
        "import sys\nfrom mmadapter.options import main_with_errors\n"
        "def run():\n    while True: print('x' * 1000)\n"
        "sys.exit(main_with_errors(run, False))"
    )
    root = Path(command.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
