"""What lies in the folder that the processes of one server share while they live."""

from typing import Final

HUB_SOCKET: Final = "hub.sock"
HTTP_SOCKET: Final = "http.sock"  # where the first process takes the requests that the others pass on
LOGGING_CONFIG: Final = "logging.json"
ENGINE_ERRORS: Final = "engine-errors.log"
CONNECTIONS: Final = "connections"  # how many each front-end has
