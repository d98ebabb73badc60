"""Print the document of `analyze` for people."""

from __future__ import annotations

from typing import Any

from anydepth.cli.display import table


def show_analysis(document: dict[str, Any]) -> None:
    """For people."""

    num_layers = len(document["per_layer"])

    def line(name: str, row: dict[str, Any]) -> list[str]:
        return [name, str(row["num_tokens"]), *_interval(row["depth"])]

    mean, interval = _interval(document["depth"])
    within = f", {interval} with 95%" if interval else ""
    flops, full = document["gflops_per_token"], document["full_depth"]["gflops_per_token"]
    print(f"{mean} of {num_layers} layers a token{within}; {document['num_tokens']} tokens")
    print(f"{flops:.3g} GFLOPs a token, {full:.3g} at full depth\n")
    if document["losses"]["rank_correlation"] is None:
        print("every token runs the same number of layers")
    else:
        rows = [line(row["class"], row) for row in document["token_classes"]]
        table(["tokens that are", "tokens", "depth", "95%"], rows)
        print()
        rows = [line(_from_to(row["first"] + 1, row["last"] + 1), row) for row in document["positions"]]
        table(["at places", "tokens", "depth", "95%"], rows)
        print()
        table(["texts of", "tokens", "depth", "95%"], [line(str(row["length"]), row) for row in document["lengths"]])
        correlation = document["losses"]["rank_correlation"]
        print(f"\ndepth goes with the loss of the next token by a rank correlation of {correlation:.2f}")
    _show_correlations(document["correlations"])
    _show_layers(document["per_layer"])
    _show_gates(document["gates"])
    found = document["conditionality"]
    if found["num_gates"]:
        least = " (the least that so many permutations can show)" if _is_least(found) else ""
        print(
            f"gates hold {found['mutual_information_bits']:.4f} bits about their token, "
            f"{found['static_bits']:.4f} by chance; p {found['p_value']:.3g}{least}"
        )
    else:
        print("no gate both opens and closes: depth does not depend on the token")
    names = [document["config"]["target"], *(document["config"].get("compare") or [])]
    for row in document["seeds"]:
        print(
            f"{names[row['first']]} and {names[row['second']]} agree in {row['agreement']:.1%} of gates, "
            f"{row['by_chance']:.1%} by chance (kappa {row['kappa']:.2f})"
        )


def _show_correlations(found: dict[str, Any] | None) -> None:
    """Print how the depth of whole texts goes with what they are."""
    if found is None or found["of"] is None:
        return
    rows = [
        [row["with"], *_correlation(row["pearson"]), *_correlation(row["spearman"])]
        for row in found["rows"]
        if row["of"] == found["of"]
    ]
    print()
    what = "depth" if found["of"] == "depth" else "FLOP share"
    table([f"{what} of {found['num_samples']} {found['unit']}s with", "Pearson", "95%", "Spearman", "95%"], rows)


def _correlation(found: dict[str, Any]) -> tuple[str, str]:
    """Return a correlation and its interval, as text."""
    if found["r"] is None:
        return "constant", ""
    return f"{found['r']:.2f}", "" if found["low"] is None else f"{found['low']:.2f} to {found['high']:.2f}"


def _show_gates(gates: list[dict[str, Any]]) -> None:
    """Print what the gates of each method do on average, and the warnings."""
    for own in gates:
        print(
            f"{own['method']}: {len(own['gates'])} gates let {own['fraction']:.1%} of tokens run (σ "
            f"{own['layer_std']:.3f} between layers, {own['token_std']:.3f} between tokens); entropy of a gate "
            f"{own['entropy']:.3f} nats, of the mean {own['entropy_of_mean']:.3f}"
        )
    for own in gates:
        for text in own["warnings"]:
            print(f"warning: {text}")


def _is_least(found: dict[str, Any]) -> bool:
    return bool(found["p_value"] <= 1 / (found["num_permutations"] + 1) + 1e-12)


def _interval(depth: dict[str, Any]) -> tuple[str, str]:
    """A mean, and from where to where."""
    return f"{depth['mean']:.2f}", "" if depth["low"] is None else f"{depth['low']:.2f} to {depth['high']:.2f}"


def _from_to(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _show_layers(rows: list[dict[str, Any]]) -> None:
    """Layers that not every token runs."""
    some = [row for row in rows if row["mixer"]["mean"] < 1 or row["ffn"]["mean"] < 1]
    if some:
        print()
        table(
            ["layer", "mixer runs for", "FFN runs for"],
            [[str(row["layer"]), f"{row['mixer']['mean']:.1%}", f"{row['ffn']['mean']:.1%}"] for row in some],
        )
        print()
