"""LongBench (arXiv:2308.14508) and LongBench v2 (arXiv:2412.15204)."""

from __future__ import annotations

from ...utils.records import Record
from .base import DataItem, get_template, name_task, take_text, take_texts


def build_longbench(record: Record, task: str) -> list[DataItem]:
    """Build the item of one LongBench entry."""
    dataset = record.fields.get("dataset")
    name = dataset if isinstance(dataset, str) and dataset else task.removesuffix("_e")
    template = get_template("longbench", name, record.where)
    head, rest = template.split({"input": take_text(record, "input")})
    classes = take_texts(record, "all_classes") if record.fields.get("all_classes") else ()
    chance = 1.0 / len(classes) if classes else 1.0 / 30 if name == "passage_retrieval_en" else None
    question = template.ask(rest, take_texts(record, "answers"), classes)
    return [
        DataItem(
            name_task(task, name),
            head,
            take_text(record, "context"),
            (question,),
            record.where,
            template.chat,
            chance,
        )
    ]


def build_longbench_v2(record: Record, task: str) -> list[DataItem]:
    """Build the item of one LongBench v2 entry, a question with four choices."""
    template = get_template("longbench_v2", "longbench_v2", record.where)
    names = ("question", "choice_A", "choice_B", "choice_C", "choice_D")
    head, rest = template.split({name: take_text(record, name).strip() for name in names})
    question = template.ask(rest, take_texts(record, "answer"))
    document = take_text(record, "context").strip()
    return [DataItem("longbench_v2", head, document, (question,), record.where, template.chat, 0.25)]
