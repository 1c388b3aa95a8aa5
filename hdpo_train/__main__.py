"""The command line: hdpo-train (= python -m hdpo_train; accelerate launch -m hdpo_train …)."""

from hdpo_train.cli.main import main

if __name__ == "__main__":
    main()
