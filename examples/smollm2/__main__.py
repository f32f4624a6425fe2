"""`python -m examples.smollm2`: fetch, dequantise and convert; print where the result is."""

import argparse
import sys
from pathlib import Path

from examples.smollm2.fetch import FetchFailed, cache_folder, fetch


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.smollm2", description=__doc__)
    parser.add_argument("--folder", type=Path, default=cache_folder(), help="where to (default %(default)s)")
    try:
        dense, mixture = fetch(parser.parse_args().folder)
    except (FetchFailed, ValueError, OSError) as error:
        print(f"examples.smollm2: {error}", file=sys.stderr)
        return 1
    print(f"dense checkpoint    {dense}\none expert a layer  {mixture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
