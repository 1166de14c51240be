"""`tightfit emulator`: boards that run here, on an emulated processor."""

from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Emulated boards: the real kernels of ONNX Runtime and LiteRT, without the board.",
)


@app.command(epilog="Example: tightfit emulator build raspberry-pi-4b")
def build(
    board: Annotated[
        list[str],
        typer.Argument(
            metavar="BOARD[/MORE]...",
            help="`tightfit emulator list` names boards. MORE: tflite-runtime, the older runtime, or login, a shell.",
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON for a machine.")] = False,
) -> None:
    """Fetch a board's system and the emulator into the cache folder."""
    from convert.console import print_json, say, working
    from convert.errors import user_errors
    from targets import emulator

    built = {}
    with working(quiet=json) as progress:
        for name in board:
            progress.stage(f"build {name}")

            def advance(what: str, done: int, total: int | None) -> None:
                progress.advance(done, total, what)

            with user_errors():
                which, *more = name.split("/")
                built[name] = str(emulator.build(which, advance, more))
    if json:
        print_json(built)
        return
    for name, folder in built.items():
        board_name, *more = name.split("/")
        use = f"{board_name}/tflite-runtime" if "tflite-runtime" in more else board_name
        say(f"{name} is ready in {folder}. Use it: --on emulated:{use}")


@app.command("list", epilog="Example: tightfit emulator list")
def list_(json: Annotated[bool, typer.Option("--json", help="Print JSON for a machine.")] = False) -> None:
    """The boards that can be emulated, and which are built."""
    from convert.console import print_json, say
    from targets import emulator

    found = {name: emulator.is_built(name) for name in emulator.boards()}
    if json:
        print_json(found)
        return
    for name, built in found.items():
        say(f"{name:<20} {'built' if built else f'not built: tightfit emulator build {name}'}")
