"""`vllm serve` with any number of front-ends: `python -m benchmarks.plain_serve --model MODEL ARGS`.

vLLM's own module for one front-end knows no others, and its console script asks for a distribution called `vllm`, which
the CPU build is not.
"""

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    """Serve as the command line says."""
    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args()
    validate_parsed_serve_args(args)
    ServeSubcommand.cmd(args)


if __name__ == "__main__":
    main()
