"""Print `results/engine.json` and `routers.json` as the tables of the page of results."""

from __future__ import annotations

from typing import Any


def markdown(sections: dict[str, Any], routers: list[dict[str, Any]], others: dict[str, dict[str, Any]]) -> str:
    """The committed results as tables; `others` has the sections of other models by name."""
    lines = of_peers(sections)
    for name, own in others.items():
        lines += ["", f"{name}:", "", *of_peers(own)]
    lines += ["", *of_loading({"SmolLM2-135M, Q4_1": sections, **others})]
    lines += ["", *of_weights(sections)] if "weights" in sections else []
    lines += ["", "| left out | decode: measured of ideal (efficiency) | prefill of 512 |", "| --- |" + " --- |" * 2]
    rows = {(row["method"], row["prompt_tokens"]): row for row in [*sections["skipping"]["rows"], *routers]}
    for name in dict.fromkeys(name for name, _ in rows):
        cells = [name, phase(rows[name, 64]["decode"]), phase(rows[name, 512]["prefill"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def of_peers(sections: dict[str, Any]) -> list[str]:
    """Every engine on the same prompts, and the perplexity of its weights."""
    columns = (
        "ms a token after 64 / 512 | × transformers | × llama.cpp | × OpenVINO | roofline | prefill 512 | perplexity"
    )
    lines = [f"| | {columns} |", "| --- |" + " --- |" * 7]
    scores = {f"fast {row['weights']}": row["perplexity"] for row in sections.get("quality", {"rows": []})["rows"]}
    rows = {(row["engine"], row["prompt_tokens"]): row for row in sections["peers"]["rows"] if "engine" in row}
    for name in dict.fromkeys(name for name, _ in rows):
        short, long = rows[name, 64], rows[name, 512]

        def over(other: str, short: dict[str, Any] = short, long: dict[str, Any] = long) -> str:
            key = f"decode_over {other}"
            return f"{short[key]:.2f} / {long[key]:.2f}" if key in short else ""

        is_ours = name.startswith("fast")
        cells = [
            name.replace("hf", "transformers"),
            f"{1000 * short['tpot_seconds']:.1f} / {1000 * long['tpot_seconds']:.1f}",
            over("hf bfloat16"),
            over(f"llama.cpp {name.split()[1]}") if is_ours else "",
            over("OpenVINO int4") if name in ("fast int4", "fast int4-nearest", "fast native") else "",
            f"{short['roofline_share']:.0%}" if is_ours else "",
            f"{1000 * long['ttft_seconds']:.0f} ms, {long['prefill_over hf bfloat16']:.2f}×",
            f"{scores[name]:.2f}" if name in scores else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def of_loading(models: dict[str, dict[str, Any]]) -> list[str]:
    """Seconds and memory of loading files in their own blocks."""
    lines = [
        "| file | MB | seconds to load | memory of the process ÷ file | with the file's pages |",
        "| --- |" + " --- |" * 4,
    ]
    for name, sections in models.items():
        for row in sections.get("loading", {"rows": []})["rows"]:
            size = row["file_bytes"]
            both = (row["own_bytes"] + size) / size
            lines.append(
                f"| {name} | {size / 1e6:.0f} | {row['seconds']:.1f} | {row['own_bytes'] / size:.2f} | {both:.2f} |"
            )
    return lines


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
