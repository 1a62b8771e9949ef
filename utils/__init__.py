"""Everything but the torch modules: one folder an idea, imported in one direction only.

common <- data <- items <- prepare and training <- run <- analysis
"""
import sys

from utils.common.errors import PerPEFTError
from utils.common.versions import check_versions

try:
    check_versions()
except PerPEFTError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
