"""The adapter for httpx2: the source of ``workerpools.httpx`` under this name, where its library is httpx2.

httpx2 continues httpx with the same API, and both may be installed. Each of the two packages imports its own library
alone, and has modules and classes of its own.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_source = Path(__file__).with_name("httpx")
_spec = spec_from_file_location(__name__, _source / "__init__.py", submodule_search_locations=[str(_source)])
assert _spec is not None
assert _spec.loader is not None
# The import system returns what stands here at the end of the import.
sys.modules[__name__] = module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
