"""Scores that others published, beside which `python -m eval.report` puts ours.

Figures are texts, so that they are shown with the digits that their source gives them, in the unit of our score files
(percent for ScienceQA and questions, from 0 to 1 for captions and entities).
"""

from __future__ import annotations

from dataclasses import dataclass

LLAMA_ADAPTER = "LLaMA-Adapter, Zhang et al. 2023, arXiv 2303.16199"
HISTORICAL = "Exploring the Performance of LLaMA 7B-Adapter, Oh (EPFL)"
SHOW_ATTEND_TELL = "Show, Attend and Tell, Xu et al. 2015, arXiv 1502.03044"


@dataclass(frozen=True)
class PublishedRow:
    """A model's scores.

    Attributes:
        model: As the source calls it.
        scores: By the names of our score files.
        source: Where the scores stand.
        detail: What else the source says, such as how many numbers were trained.
        marked: Whether charts have a mark for it.
    """

    model: str
    scores: dict[str, str]
    source: str
    detail: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Published:
    """Scores over one test set.

    Attributes:
        name: What `--published` calls it.
        task: As in our score files.
        title: The test set, in words.
        rows: The scores.
        split: Of the test set, any of these; empty where it does not matter.
        examples: How many it has, None where that is not known.
        file: Parts of the annotation or gold file's name, in lower case; none where the task has one data set.
        column: Of HIPE's gold files.
        caveat: What keeps the scores from being compared with ours as they stand.
    """

    name: str
    task: str
    title: str
    rows: tuple[PublishedRow, ...]
    split: tuple[str, ...] = ()
    examples: int | None = None
    file: tuple[str, ...] = ()
    column: str = ""
    caveat: str = ""


SCIENCEQA_CLASSES = ("avg", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")


def _scienceqa(model: str, tuned: str, scores: str, source: str = "Table 2", marked: bool = False) -> PublishedRow:
    """A row of all classes, or of the average alone."""
    values = scores.split()
    names = SCIENCEQA_CLASSES if len(values) > 1 else SCIENCEQA_CLASSES[:1]
    where = source if "," in source else f"{LLAMA_ADAPTER}, {source}"
    detail = {"": "", "0": "nothing trained"}.get(tuned, f"{tuned} trained")
    return PublishedRow(model, dict(zip(names, values, strict=True)), where, detail, marked)


def _captions(model: str, source: str, marked: bool = False, **scores: str) -> PublishedRow:
    return PublishedRow(model, scores, source, marked=marked)


def _questions(model: str, exact_match: str, f1: str) -> PublishedRow:
    return PublishedRow(model, {"exact_match": exact_match, "f1": f1}, HISTORICAL)


def _entities(model: str, source: str, precision: str, recall: str, f1: str, detail: str = "") -> PublishedRow:
    scores = {"strict.P": precision, "strict.R": recall, "strict.F1": f1}
    return PublishedRow(model, scores, source, detail, marked=True)


TABLES = (
    Published(
        name="scienceqa-test",
        task="scienceqa",
        title="ScienceQA test",
        split=("test",),
        examples=4241,
        rows=(
            _scienceqa("random", "", "39.83 40.28 46.13 29.25 47.45 40.08 33.66 39.35 40.67", marked=True),
            _scienceqa("human", "", "88.40 90.23 84.97 87.48 89.60 87.50 88.10 91.59 82.42"),
            _scienceqa("MCAN", "95M", "54.54 56.08 46.23 58.09 59.43 51.17 55.40 51.65 59.72"),
            _scienceqa("VisualBERT", "111M", "61.87 59.33 69.18 61.18 62.71 62.17 58.54 62.96 59.92"),
            _scienceqa("UnifiedQA", "223M", "70.12 68.16 69.18 74.91 63.78 61.38 77.84 72.98 65.00"),
            _scienceqa("UnifiedQA CoT", "223M", "74.11 71.00 76.04 78.91 66.42 66.53 81.81 77.06 68.82"),
            _scienceqa("GPT-3", "0", "74.04 75.04 66.59 78.00 74.24 65.74 79.58 76.36 69.87"),
            _scienceqa("GPT-3 CoT", "0", "75.17 75.44 70.87 78.09 74.68 67.43 79.93 78.23 69.68"),
            _scienceqa("ChatGPT CoT", "0", "78.31 78.82 70.98 83.18 77.37 67.92 86.13 80.72 74.03"),
            _scienceqa("GPT-4 CoT", "0", "83.99 85.48 72.44 90.27 82.65 71.49 92.89 86.66 79.04"),
            _scienceqa("MM-CoT, text", "223M", "70.53 71.09 70.75 69.18 71.16 65.84 71.57 71.00 69.68"),
            _scienceqa("MM-CoT", "223M", "84.91 87.52 77.17 85.82 87.88 82.90 86.83 84.65 85.37"),
            _scienceqa("LLaMA-7B, zero-shot, text", "0", "40.32", source=f"{HISTORICAL}, ScienceQA"),
            _scienceqa("LLaMA-7B, 3 shots, text", "0", "43.69", source=f"{HISTORICAL}, ScienceQA"),
            _scienceqa(
                "LLaMA-7B adapter, text",
                "",
                "78.28 79.57 73.57 79.45 78.84 70.75 82.51 80.58 74.16",
                source=f"{HISTORICAL}, ScienceQA",
            ),
            _scienceqa("LLaMA-Adapter, text", "1.2M", "78.31 79.00 73.79 80.55 78.30 70.35 83.14 79.77 75.68"),
            _scienceqa("LLaMA-Adapter", "1.8M", "85.19 84.37 88.30 84.36 83.72 80.32 86.90 85.83 84.05", marked=True),
        ),
    ),
    Published(
        name="coco-karpathy",
        task="caption",
        title="COCO Caption, Karpathy's val split",
        split=("val", "test"),
        examples=5000,
        file=("coco",),
        caveat="The paper says Karpathy val; the works it quotes report his test split.",
        rows=(
            _captions("BLIP", f"{LLAMA_ADAPTER}, Table 5", Bleu_4=".404", CIDEr="1.367"),
            _captions("BLIP-2", f"{LLAMA_ADAPTER}, Table 5", Bleu_4=".437", CIDEr="1.453"),
            _captions("ClipCap", f"{LLAMA_ADAPTER}, Table 5", Bleu_4=".335", CIDEr="1.131"),
            _captions("LLaMA-Adapter", f"{LLAMA_ADAPTER}, Table 5", marked=True, Bleu_4=".362", CIDEr="1.222"),
        ),
    ),
    Published(
        name="flickr8k-test",
        task="caption",
        title="Flickr8k test",
        split=("test",),
        examples=1000,
        file=("flickr8k",),
        rows=(
            _captions("Show and Tell", "as reported by the works that followed it", Bleu_1=".63"),
            _captions(
                "Show, Attend and Tell, soft attention",
                SHOW_ATTEND_TELL,
                Bleu_1=".67",
                Bleu_2=".448",
                Bleu_3=".299",
                Bleu_4=".195",
                METEOR=".189",
            ),
            _captions(
                "Show, Attend and Tell, hard attention",
                SHOW_ATTEND_TELL,
                marked=True,
                Bleu_1=".67",
                Bleu_2=".457",
                Bleu_3=".314",
                Bleu_4=".213",
                METEOR=".203",
            ),
        ),
    ),
    Published(
        name="archivalqa-test",
        task="qa",
        title="ArchivalQA test",
        file=("archivalqa", "test"),
        rows=(
            _questions("DrQA, Wikipedia", "7.53", "11.64"),
            _questions("DrQA, NYT", "38.13", "46.12"),
            _questions("BERTserini, Wikipedia", "10.19", "16.25"),
            _questions("BERTserini, NYT", "54.30", "66.05"),
            _questions("LLaMA 7B, zero-shot", "0", ".03"),
            _questions("LLaMA 7B, 3 shots", ".03", ".56"),
            _questions("LLaMA 7B adapter", "11.57", "16.59"),
        ),
    ),
    Published(
        name="hipe2020-fr-test",
        task="ner",
        title="HIPE 2020, French test",
        file=("hipe2020", "test", "fr"),
        column="NE-COARSE-LIT",
        caveat="LLaMA 7B adapter was scored by nervaluate, the baseline by HIPE's own scorer.",
        rows=(
            _entities("neurbsl (HIPE-2022 baseline)", "HIPE-2022 results, strict coarse micro", ".730", ".785", ".757"),
            _entities("LLaMA 7B adapter, JSON prompt", HISTORICAL, ".4076", ".4231", ".4152", "nervaluate, strict"),
            _entities("LLaMA 7B adapter, IOB prompt", HISTORICAL, ".4503", ".2375", ".3110", "nervaluate, strict"),
        ),
    ),
)
