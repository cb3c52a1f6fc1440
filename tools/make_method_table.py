# ruff: noqa: RUF001 - Chinese has its own punctuation.
"""Write the tables of selectors and strategies in both READMEs from the registries.

python tools/make_method_table.py

English is what the registries say; a new method needs its line of Chinese in ``CHINESE`` below.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
HEADS = {
    "README.md": {
        "selectors": ("selector", "options", "what it does", "reads", "cost", "source"),
        "strategies": ("strategy", "options", "weight of a layer", "reads", "cost", "source"),
    },
    "README.zh-CN.md": {
        "selectors": ("选择器", "选项", "做法", "读取", "开销", "出处"),
        "strategies": ("策略", "选项", "一层的权重", "读取", "开销", "出处"),
    },
}

#: One line for each method, by kind and name.
CHINESE = {
    "selectors": {
        "snapkv": "观察窗口给每个键的注意力，沿键做池化",
        "h2o": "整个因果注意力矩阵的列和",
        "streaming_llm": "按新近程度",
        "tova": "最新 query 给每个键的注意力，对该层所有头取平均",
        "knorm": "键的范数取负：范数小的键先保留",
        "keydiff": "与平均键的余弦相似度取负：与众不同的键先保留",
        "lagkv": "键与值在下一块的参照下归一化后的离散程度",
        "expected_attention": "由历史 query 的分布估计的、将来的期望注意力",
        "qfilter": "键在校准得到的 query 主方向上的投影",
        "cur": "键与值的杠杆分数",
        "lava": "观察窗口的注意力，乘以该头最大的值范数",
        "criticalkv": "按每个键的值经输出投影后的范数为注意力分数加权，分两个阶段",
        "chunkkv": "每个 token 取其所在块的平均分数，对该层所有头取平均",
        "random": "由种子、层、头和 token 决定的均匀随机数",
    },
    "strategies": {
        "proportional": "秩",
        "power": "秩的 exponent 次幂",
        "softmax": "softmax(秩 / 平均秩 / temperature)",
        "adaptive": "秩；低于低分位数的减少，高于高分位数的增加",
        "uniform": "各层相同",
        "pyramid": "随深度线性下降，从平均的 1 + steepness 倍到 1 - steepness 倍；有 `beta` 时取 PyramidKV 的长度",
        "cake": "CAKE 的层偏好 H ** (1 / tau1) * V ** (1 / tau2)：窗口注意力的熵与方差",
        "lava": "LAVa 的层熵：层内分数（注意力 x 最大值范数）归一成一个分布后的熵",
        "zigzagkv": "ZigZagKV 的层不确定度：装下窗口注意力的 `mass` 所需的 token 占比",
        "dynamickv": "窗口，加上所有层的最高分里属于本层的个数",
        "distortion": "使 rank ** rank_exponent x 输出误差之和最小；误差在未参与选择的 query 上试得",
        "profile": "使实测失真之和最小；有 `exponent` 时为实测敏感度的 exponent 次幂",
        "blend": "实测敏感度的 profile_exponent 次幂，乘以秩的 rank_exponent 次幂",
        "inverse": "秩的倒数；秩为 0 时按最小的正秩计",
        "random": "按种子在 0.2 到 1.8 之间均匀抽取",
    },
}

#: Words of the columns that follow a fixed vocabulary; longer ones first, since they are replaced inside a cell.
WORDS = {
    "window attention": "窗口注意力",
    "whole attention": "整个注意力",
    "keys and values": "键和值",
    "keys only": "仅键",
    "queries": "查询",
    "nothing": "无",
    "control": "对照",
    "baseline": "基线",
    "ranks": "秩",
    "window": "窗口",
    "hidden": "隐藏维度",
    "layers": "层",
    "keys": "键",
    "chunks": "块",
    "budgets by rank: this project": "按秩分配：本项目",
    "effective rank": "有效秩",
    "after": "仿",
}


def translate(cell: str) -> str:
    """Return a cell in Chinese where the vocabulary has its words."""
    words = sorted(WORDS, key=len, reverse=True)
    return re.sub(rf"\b({'|'.join(words)})\b", lambda match: WORDS[match[1]], cell)


def list_methods(kind: str) -> list[dict[str, object]]:
    """Return the records of a registry, as ``rankkv methods --json`` shows them."""
    from rankkv.cli.methods import describe_methods

    return describe_methods()[kind]


def make_table(readme: str, kind: str) -> str:
    """Return one table as Markdown, its markers included."""
    head = HEADS[readme][kind]
    lines = [f"<!-- {kind}:begin -->", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for method in list_methods(kind):
        name, description = str(method["name"]), str(method["description"]).rstrip(".")
        rest = [str(method[column]) for column in ("needs", "cost", "source")]
        if readme != READMES[0]:
            if name not in CHINESE[kind]:
                sys.exit(
                    f"{name} has no line of Chinese: add one to CHINESE[{kind!r}] in {Path(__file__).name}."
                )
            description, rest = CHINESE[kind][name], [translate(cell) for cell in rest]
        options = method["options"]
        assert isinstance(options, dict)
        shown = ", ".join(f"{option}={value!r}" for option, value in options.items())
        cells = [f"`{name}`", f"`{shown}`" if shown else "", description, *rest]
        lines.append("|" + "".join(f" {cell} |" if cell else " |" for cell in cells))
    return "\n".join([*lines, f"<!-- {kind}:end -->"])


def main() -> None:
    """Put the tables between their markers in both READMEs."""
    from rankkv.utils.files import write_text_atomically

    for readme in READMES:
        path = ROOT / readme
        text = path.read_text(encoding="utf-8")
        for kind in HEADS[readme]:
            begin, end = f"<!-- {kind}:begin -->", f"<!-- {kind}:end -->"
            before, _, rest = text.partition(begin)
            _, found, after = rest.partition(end)
            if not found:
                sys.exit(f"{readme} has no place for the table: put {begin} and {end} where it goes.")
            text = before + make_table(readme, kind) + after
        write_text_atomically(path, text)


if __name__ == "__main__":
    main()
