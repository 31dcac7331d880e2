"""Start the agent: ``python -m mlinfra_sdk.worker DIRECTORY``."""

from mlinfra_sdk.worker.agent import main

main()
