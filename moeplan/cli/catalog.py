"""`moeplan catalog`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from moeplan.cli.options import json_option, print_json, remark
from moeplan.units import GIB, TERA, format_count


@click.command()
@click.argument("kind", type=click.Choice(["models", "devices", "clusters"]))
@click.argument("name", required=False, metavar="[NAME or FILE]")
@json_option
def catalog(kind: str, name: str | None, as_json: bool) -> int:
    """List models, devices and clusters with the sources of their numbers.

    \b
    Examples:
      moeplan catalog models
      moeplan catalog models deepseek-v3 --json
      moeplan catalog models path/to/config.json
      moeplan catalog devices h100
      moeplan catalog clusters gb200x72
    """
    show = {"models": _models, "devices": _devices, "clusters": _clusters}[kind]
    show(name, as_json)
    return 0


def _models(name: str | None, as_json: bool) -> None:
    from moeplan.costmodels.model_catalog import load_model, model_names

    if name is not None:
        data = _model_data(load_model(name))
        _print(data, as_json)
        for text in data["remarks"]:
            if not as_json:
                remark(text)
        return
    if as_json:
        print_json([_model_data(load_model(n)) for n in model_names()])
        return
    rows = []
    for n in model_names():
        d = _model_data(load_model(n))
        rows.append(
            (n, format_count(d["total_parameters"]), format_count(d["active_parameters"]), str(d["layers"]), d["source"])
        )
    _table(("name", "parameters", "active", "layers", "source"), rows)


def _model_data(model: Any) -> dict[str, Any]:
    from moeplan.costmodels.counts import flops_per_token, parameter_count

    count = parameter_count(model)
    moe = model.moe
    data: dict[str, Any] = {
        "name": model.name,
        "family": model.family,
        "total_parameters": count.total,
        "active_parameters": round(count.active),
        "active_parameters_without_embedding": round(count.active_without_embedding),
        "routed_expert_parameters": count.routed,
        "mtp_parameters": count.mtp,
        "layers": len(model.layers),
        "layer_kinds": [
            {"layers": model.kind_of_layer.count(i), "blocks": [_block_text(b) for b in kind.blocks]}
            for i, kind in enumerate(model.kinds)
        ],
        "mtp_layers": len(model.mtp),
        "hidden": model.hidden,
        "vocabulary": model.vocab,
        "tied_embeddings": model.tied,
        "max_positions": model.max_positions,
        "training_gflop_per_token_at_4096": round(flops_per_token(model, 4096) / 1e9, 3),
        "source": model.source,
        "remarks": list(model.remarks),
    }
    if moe is not None:
        data |= {
            "experts": moe.experts,
            "experts_per_token": moe.topk,
            "expert_width": moe.width,
            "shared_expert_width": moe.shared_width,
        }
    return data


def _block_text(block: Any) -> str:
    import dataclasses

    values = []
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if value != field.default and not dataclasses.is_dataclass(value):
            values.append(f"{field.name} {value}")
    return f"{type(block).__name__}({', '.join(values)})"


def _devices(name: str | None, as_json: bool) -> None:
    from moeplan.profiles.hardware import describe_device, device_names, load_device

    if name is not None:
        _print(describe_device(name), as_json)
        return
    if as_json:
        print_json([describe_device(n) for n in device_names()])
        return
    rows = []
    for n in device_names():
        d = load_device(n)
        peaks = [f"{d.peak_flop_per_s[p] / TERA:,.0f}" if p in d.peak_flop_per_s else "-" for p in ("bf16", "fp8", "fp4")]
        rows.append((n, f"{d.memory_bytes / GIB:.1f}", f"{d.memory_bytes_per_s / TERA:.2f}", *peaks, d.capability))
    _table(("name", "GiB", "TB/s", "bf16 TFLOP/s", "fp8", "fp4", "capability"), rows)


def _clusters(name: str | None, as_json: bool) -> None:
    from moeplan.profiles.hardware import cluster_names, describe_cluster, load_cluster

    if name is not None:
        cluster = load_cluster(name)
        data = _cluster_data(cluster)
        if cluster.name in cluster_names():
            data["catalog"] = describe_cluster(cluster.name)
        _print(data, as_json)
        return
    if as_json:
        print_json([{**_cluster_data(load_cluster(n)), "catalog": describe_cluster(n)} for n in cluster_names()])
        return
    rows = []
    for n in cluster_names():
        d = _cluster_data(load_cluster(n))
        rows.append((n, d["device"], str(d["gpus"]), str(d["gpus_per_node"]), str(d["nvlink_domain"]), d["scale_out"]))
    _table(("name", "device", "GPUs", "per node", "NVLink domain", "network per NIC"), rows)


def _cluster_data(cluster: Any) -> dict[str, Any]:
    return {
        "name": cluster.name,
        "device": cluster.device.name,
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "nvlink_domain": cluster.domain_gpus,
        "scale_up": f"{cluster.scale_up.name}, {cluster.scale_up.bytes_per_s / 1e9:g} GB/s per GPU and direction",
        "scale_out": f"{cluster.scale_out.name}, {cluster.scale_out.bytes_per_s / 1e9:g} GB/s",
        "nics_per_node": cluster.nics_per_node,
        "scale_out_gb_per_s_per_gpu": cluster.scale_out_bytes_per_s_per_gpu / 1e9,
        "oversubscription": cluster.oversubscription,
        "host_memory_gib": cluster.host_memory_bytes / GIB,
        "pcie": f"{cluster.pcie.name}, {cluster.pcie.bytes_per_s / 1e9:g} GB/s",
        "price_per_gpu_hour": cluster.price_per_gpu_hour,
    }


def _print(data: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(data)
        return
    from moeplan.records import dump_yaml

    click.echo(dump_yaml(data, compact=False), nl=False)


def _table(names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.table import Table

    from moeplan.cli.render import console

    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(names):
        table.add_column(name, overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console().print(table)
