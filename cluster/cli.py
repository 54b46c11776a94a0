"""The command line. Heavy imports happen inside the commands: --help is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dist_dp.cluster.bench.commands import bench_app
from dist_dp.cluster.data_commands import convert, generate
from dist_dp.cluster.node_commands import cluster_app
from dist_dp.cluster.readable_errors import readable_errors

app = typer.Typer(
    help="Private training of recommenders with sharded embedding tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
budget_app = typer.Typer(help="Look at and set the privacy budgets in the ledger.")
app.add_typer(budget_app, name="budget", no_args_is_help=True)
app.add_typer(bench_app, name="bench", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster", no_args_is_help=True)
app.command("convert")(convert)
app.command("generate")(generate)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file; see examples/.")
]
DataOption = Annotated[
    str | None, typer.Option("--data", "-d", help="File, folder or converted store.")
]
EpsilonOption = Annotated[float | None, typer.Option(help="Target ε of the run.")]
DeltaOption = Annotated[float | None, typer.Option(help="δ; by default 0.1 / records.")]
WorkersOption = Annotated[
    int | None, typer.Option("--num-workers", "--workers", help="Number of Ray workers.")
]
SkipOption = Annotated[bool, typer.Option("--skip-bad-rows", help="Count and leave out bad rows.")]
ForceDeltaOption = Annotated[bool, typer.Option("--force-delta", help="Accept δ ≥ 1/records.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Examples at a time.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Any setting, as KEY=VALUE; repeatable.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the libraries' logs.")]
LedgerOption = Annotated[
    str | None,
    typer.Option(help="Path or postgresql:// URL of the ledger; by default one place per user."),
]


def _config(
    config: Path | None,
    data: str | None,
    epsilon: float | None,
    delta: float | None,
    num_workers: int | None,
    settings: list[str] | None,
    **more: Any,
) -> Any:
    from dist_dp.cluster.config import load_config, parse_overrides

    options: dict[str, Any] = {
        "data.path": data,
        "privacy.epsilon": epsilon,
        "privacy.delta": delta,
        "cluster.num_workers": num_workers,
        **more,
    }
    given = {key: value for key, value in options.items() if value is not None}
    return load_config(config, {**given, **parse_overrides(settings or [])})


@app.command()
@readable_errors
def train(
    config: ConfigOption = None,
    data: DataOption = None,
    epsilon: EpsilonOption = None,
    delta: DeltaOption = None,
    num_workers: WorkersOption = None,
    address: Annotated[
        str | None, typer.Option(help="Running Ray cluster; by default one is started here.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of all runs.")] = None,
    skip_bad_rows: SkipOption = False,
    allow_large_delta: ForceDeltaOption = False,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder of an unfinished run to go on with.")
    ] = None,
    settings: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Train a model and release it with its privacy statement."""
    from dist_dp.cluster.config import parse_overrides
    from dist_dp.cluster.console import print_summary, watched_fit
    from dist_dp.errors import ConfigError

    if resume is not None:
        given = [config, data, epsilon, delta, name, output]
        if skip_bad_rows or allow_large_delta or any(value is not None for value in given):
            raise ConfigError(
                "--resume goes on with the run's own configuration; leave the other options out "
                "(but for --num-workers, --address and --set of cluster, sharding and checkpoints)"
            )
        options = {"cluster.num_workers": num_workers, "cluster.address": address}
        changes = {key: value for key, value in options.items() if value is not None}
        changes |= parse_overrides(settings or [])
        print_summary(*watched_fit(resume, changes, verbose=verbose))
        return
    resolved = _config(
        config,
        data,
        epsilon,
        delta,
        num_workers,
        settings,
        **{
            "cluster.address": address,
            "output.name": name,
            "output.folder": output,
            "data.skip_bad_rows": skip_bad_rows or None,
            "privacy.allow_large_delta": allow_large_delta or None,
        },
    )
    print_summary(*watched_fit(resolved, verbose=verbose))


@app.command()
@readable_errors
def plan(
    config: ConfigOption = None,
    data: DataOption = None,
    num_records: Annotated[
        int | None, typer.Option(min=1, help="Training records, to plan without the data.")
    ] = None,
    num_users: Annotated[
        int | None, typer.Option(min=1, help="Or their users, with privacy.unit user.")
    ] = None,
    epsilon: EpsilonOption = None,
    delta: DeltaOption = None,
    num_workers: WorkersOption = None,
    skip_bad_rows: SkipOption = False,
    allow_large_delta: ForceDeltaOption = False,
    settings: SetOption = None,
    machine: Annotated[
        Path | None, typer.Option(help="Rates of a worker's machine (dist-dp bench machine).")
    ] = None,
    pooling: Annotated[float, typer.Option(min=0.0, help="Ids in each bag, to forecast.")] = 1.0,
    network_gbits: Annotated[
        float | None, typer.Option(min=0.001, help="Each worker's link, to forecast.")
    ] = None,
    latency_us: Annotated[
        float | None, typer.Option(min=0.0, help="Of a message, to forecast.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Show noise, steps, batch, memory, sharding and a step's time before anything runs."""
    from dist_dp.cluster.forecast import Speed
    from dist_dp.cluster.planning import make_report, print_report

    resolved = _config(
        config,
        data,
        epsilon,
        delta,
        num_workers,
        settings,
        **{
            "data.skip_bad_rows": skip_bad_rows or None,
            "privacy.allow_large_delta": allow_large_delta or None,
        },
    )
    speed = Speed(machine, pooling, network_gbits, latency_us)
    report = make_report(
        resolved, num_records=num_records, num_users=num_users, speed=speed, verbose=verbose
    )
    if json_output:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)


@app.command()
@readable_errors
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, or a released model.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Held-out records.")],
    batch_size: BatchOption = 8192,
    format_name: Annotated[str, typer.Option("--format", help="Format of the records.")] = "auto",
    skip_bad_rows: SkipOption = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Evaluate a released model on held-out records."""
    from dist_dp.cluster.serving import evaluate_release, print_metrics

    metrics = evaluate_release(
        run,
        data,
        batch_size=batch_size,
        skip_bad_rows=skip_bad_rows,
        format_name=format_name,
        verbose=verbose,
    )
    if json_output:
        print(json.dumps(metrics, indent=2))
    else:
        print_metrics(metrics)


@app.command()
@readable_errors
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder, or a released model.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Records in the training format.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Parquet file to write.")],
    batch_size: BatchOption = 8192,
    format_name: Annotated[str, typer.Option("--format", help="Format of the records.")] = "auto",
    verbose: VerboseOption = False,
) -> None:
    """Write a released model's predictions, in the order of the records."""
    from dist_dp.cluster.serving import predict_release

    count = predict_release(
        run, data, out, batch_size=batch_size, format_name=format_name, verbose=verbose
    )
    print(f"{count:,} predictions in {out}")


@app.command()
@readable_errors
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to create.")],
) -> None:
    """Copy a run's released model, checked file by file."""
    from dist_dp.cluster.serving import export_release

    folder = export_release(run, to)
    print(f"released model in {folder} (start with {folder / 'MODEL_CARD.md'})")


@app.command()
@readable_errors
def epsilon(
    noise_multiplier: Annotated[float | None, typer.Option(help="σ; or give --epsilon.")] = None,
    target_epsilon: Annotated[float | None, typer.Option("--epsilon", help="Target ε.")] = None,
    delta: Annotated[float, typer.Option(help="δ.")] = 1e-6,
    sample_rate: Annotated[float | None, typer.Option(help="Sampling probability.")] = None,
    records: Annotated[int | None, typer.Option(min=1, help="Records, with --batch-size.")] = None,
    batch_size: Annotated[float | None, typer.Option(min=0, help="Expected batch size.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps.")] = 1,
    accountant: Annotated[Literal["pld", "rdp"], typer.Option(help="How ε is composed.")] = "pld",
) -> None:
    """Compute ε from σ, or σ from ε, for Poisson-sampled DP-SGD."""
    from dist_dp.accounting import GaussianEvent, epsilon_of
    from dist_dp.calibration import calibrate_noise_multiplier
    from dist_dp.errors import ConfigError
    from dist_dp.figures import round_up

    if sample_rate is None:
        if not records or not batch_size:
            raise ConfigError("give --sample-rate, or --records and --batch-size")
        sample_rate = batch_size / records
    if (noise_multiplier is None) == (target_epsilon is None):
        raise ConfigError("give either --noise-multiplier or --epsilon")
    if noise_multiplier is None:
        assert target_epsilon is not None
        noise_multiplier = calibrate_noise_multiplier(
            target_epsilon, delta, sample_rate, steps, accountant
        )
    spent = epsilon_of(
        {GaussianEvent(noise_multiplier, sample_rate): steps}, delta, accountant=accountant
    )
    print(
        f"noise multiplier {noise_multiplier:.6g}, sample rate {sample_rate:.6g}, {steps} steps: "
        f"ε = {round_up(spent, 6)} at δ = {delta:g} ({accountant.upper()})"
    )


@budget_app.command("show")
@readable_errors
def budget_show(
    dataset: Annotated[str | None, typer.Argument(help="Data set; all by default.")] = None,
    ledger: LedgerOption = None,
) -> None:
    """Show what each data set has spent, and on what."""
    from dist_dp.cluster.budget import show

    show(ledger, dataset)


@budget_app.command("set")
@readable_errors
def budget_set(
    dataset: Annotated[str, typer.Argument(help="Data set.")],
    epsilon: Annotated[float, typer.Option(help="New total ε.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept in the ledger.")],
    delta: Annotated[float | None, typer.Option(help="New total δ.")] = None,
    allow_large_delta: ForceDeltaOption = False,
    ledger: LedgerOption = None,
) -> None:
    """Change the total budget of a data set; the change is recorded."""
    from dist_dp.cluster.budget import change

    change(ledger, dataset, epsilon, delta, reason, allow_large_delta)


@budget_app.command("history")
@readable_errors
def budget_history(
    dataset: Annotated[str | None, typer.Argument(help="Data set; all by default.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ledger: LedgerOption = None,
) -> None:
    """Show every entry of the ledger, or of one data set."""
    from dist_dp.cluster.budget import history

    history(ledger, dataset, json_output=json_output)


@budget_app.command("verify")
@readable_errors
def budget_verify(
    export: Annotated[
        Path | None, typer.Argument(help="A file of budget export, instead of the ledger.")
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Accept a ledger without, or behind, its witness.")
    ] = False,
    reason: Annotated[
        str | None, typer.Option(help="Why it is adopted; it is kept in the ledger.")
    ] = None,
    ledger: LedgerOption = None,
) -> None:
    """Check every entry against its hash and the one before; exit status 1 on damage.

    An exported file is checked by itself; with --ledger too, also that the ledger still holds
    all of it.
    """
    from dist_dp.cluster.budget import verify

    verify(ledger, export, adopt=adopt, reason=reason)


@budget_app.command("export")
@readable_errors
def budget_export(
    out: Annotated[Path, typer.Argument(help="File to write: JSON lines, with hashes.")],
    ledger: LedgerOption = None,
) -> None:
    """Write the whole ledger to a file that can be checked anywhere (budget verify FILE)."""
    from dist_dp.cluster.budget import export

    export(ledger, out)


@app.command()
@readable_errors
def demo(
    output: Annotated[Path, typer.Option(help="Folder for data, ledger and runs.")] = Path("runs"),
    records: Annotated[int, typer.Option(min=1, help="Records to generate.")] = 60_000,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers.")] = 2,
    verbose: VerboseOption = False,
) -> None:
    """Generate click logs and train on them privately, on local Ray workers."""
    from dist_dp.cluster.demo import run_demo

    run_demo(output, records=records, workers=workers, verbose=verbose)


def main() -> None:
    """Entry point."""
    app()
