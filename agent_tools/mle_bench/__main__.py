"""Run the command line."""

from agent_tools.mle_bench.cli import main

if __name__ == "__main__":
    main()
