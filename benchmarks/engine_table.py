"""Print `results/engine.json` and `routers.json` as the tables of the page of results."""

from __future__ import annotations

from typing import Any


def markdown(sections: dict[str, Any], routers: list[dict[str, Any]]) -> str:
    """The committed results as tables."""
    lines = [
        (
            "| | ms a token after 64 / 512 | × transformers | × llama.cpp | roofline | prefill 512, × transformers "
            "| perplexity |"
        ),
        "| --- |" + " --- |" * 6,
    ]
    perplexity = {f"fast {row['weights']}": row["perplexity"] for row in sections["quality"]["rows"]}
    rows = {(row["engine"], row["prompt_tokens"]): row for row in sections["peers"]["rows"] if "engine" in row}
    for name in dict.fromkeys(name for name, _ in rows):
        short, long = rows[name, 64], rows[name, 512]
        peer = f"decode_over llama.cpp {name.split()[1]}"
        against = f"{short[peer]:.2f} / {long[peer]:.2f}" if name.startswith("fast") and peer in short else ""
        cells = [
            name.replace("hf", "transformers"),
            f"{1000 * short['tpot_seconds']:.1f} / {1000 * long['tpot_seconds']:.1f}",
            f"{short['decode_over hf bfloat16']:.2f} / {long['decode_over hf bfloat16']:.2f}",
            against,
            f"{short['roofline_share']:.0%}" if "roofline_share" in short else "",
            f"{long['prefill_over hf bfloat16']:.2f}",
            f"{perplexity[name]:.2f}" if name in perplexity else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *of_weights(sections)] if "weights" in sections else []
    lines += ["", "| left out | decode: measured of ideal (efficiency) | prefill of 512 |", "| --- |" + " --- |" * 2]
    rows = {(row["method"], row["prompt_tokens"]): row for row in [*sections["skipping"]["rows"], *routers]}
    for name in dict.fromkeys(name for name, _ in rows):
        cells = [name, phase(rows[name, 64]["decode"]), phase(rows[name, 512]["prefill"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def of_weights(sections: dict[str, Any]) -> list[str]:
    """The kinds of weights next to bfloat16."""
    lines = [
        (
            "| weights | ms a token after 64 / 512 | × bfloat16 | roofline | prefill 512, × bfloat16 "
            "| pass over 4 / 8 tokens ÷ over 1 |"
        ),
        "| --- |" + " --- |" * 5,
    ]
    rows = {(row["weights"], row["prompt_tokens"]): row for row in sections["weights"]["rows"]}
    passes = {(row["weights"], row["tokens"]): row["over_one"] for row in sections["verify"]["rows"]}
    for kind in dict.fromkeys(kind for kind, _ in rows):
        short, long = rows[kind, 64], rows[kind, 512]
        cells = [
            kind,
            f"{1000 * short['tpot_seconds']:.1f} / {1000 * long['tpot_seconds']:.1f}",
            f"{short['decode_over bfloat16']:.2f} / {long['decode_over bfloat16']:.2f}",
            f"{short['roofline_share']:.0%}",
            f"{long['prefill_over bfloat16']:.2f}",
            f"{passes[kind, 4]:.2f} / {passes[kind, 8]:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def phase(part: dict[str, float]) -> str:
    return f"{part['speedup']:.2f}× of {part['ideal_speedup']:.2f}× ({part['realised']:.2f})"
