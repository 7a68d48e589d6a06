"""Shows what a run would train on: `python -m alignjax.inspect --config=NAME [--a.b=value ...]`.

It plans the run as training does, and trains nothing. It takes no lock and writes one HTML file and
the caches that training reads as well, so it can look at a run that is going on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from alignjax import checks, command, validate
from alignjax import config as configs
from alignjax.errors import UserError


@dataclass(frozen=True)
class Inspect:
    """What to show, beside the keys of the run."""

    rows: configs.Count = 3  # packed rows to show
    html: str = ""  # the page to write; empty: RUN_DIR/inspect.html
    skip_loss: bool = False  # leave out the first batch's loss, which alone needs the weights


def main() -> int:
    args, config = configs.parse_with(Inspect(), "alignjax.inspect")
    checks.check_training(config)
    check(args)
    return inspect(args, config)


def check(args: Inspect) -> None:
    validate.check(args, Inspect, "")
    if args.html and not args.html.endswith(".html"):
        raise UserError(f"--html={args.html}: name a file that ends in .html.")


def page_file(args: Inspect, config: configs.Training) -> Path:
    """Where the page goes; UserError where a directory or another file has its name."""
    from alignjax.files import check_own, location
    from alignjax.inspection.page import BEGINS

    file = location(args.html) if args.html else configs.run_dir(config) / "inspect.html"
    check_own(file, BEGINS)
    return file


def inspect(args: Inspect, config: configs.Training) -> int:
    from alignjax.progress import say

    say(f"inspecting {config.name}")
    import jax

    from alignjax import processes
    from alignjax.files import write_whole
    from alignjax.inspection import terminal
    from alignjax.inspection.contents import contents
    from alignjax.inspection.first_batch import first_batch
    from alignjax.inspection.page import page
    from alignjax.progress import only_first_process
    from alignjax.run import planned
    from alignjax.sharding import use_mesh

    processes.join(configs.flat(configs.to_dict(config)))
    only_first_process(jax.process_index())
    file = processes.in_turn(lambda: page_file(args, config))
    if args.skip_loss:
        use_mesh(replica=-1, fsdp=1)  # the plan of a large mesh can be seen on a small one
    else:
        use_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    run = planned(config, weights=not args.skip_loss)
    first = None if args.skip_loss else first_batch(run)
    if processes.is_first():
        found = contents(run, args.rows)
        terminal.show(found, first)
        write_whole(file, page(found, first))
        say(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
