"""Every method by its name: the built-in ones, which `methods/__init__.py` adds, and those of other installed packages.

Open this file to see how `--method NAME` is looked up. docs/extending.md shows a package that provides a method.
"""

from collections.abc import Iterator, MutableMapping

from sku_vllm import extensions
from sku_vllm.errors import ConfigError
from sku_vllm.methods.method import Method


class Registry(MutableMapping[str, Method]):
    """Method name → recipe. Another package's method is imported when it is looked up, and not when names are listed.

    A built-in name always means the built-in method, so that installing a package cannot change what a name trains.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Method] = {}

    def __getitem__(self, name: str) -> Method:
        """The method of that name.

        Raises:
            KeyError: no method has that name.
            ConfigError: the package that provides it cannot be imported, or its entry point is no Method of that name.
        """
        if name not in self._loaded:
            found = extensions.load_extension(extensions.METHODS, name)
            if not isinstance(found, Method) or found.name != name:
                what = f"a method called {found.name!r}" if isinstance(found, Method) else f"a {type(found).__name__}"
                raise ConfigError(f"{extensions.METHODS}: {name!r} points to {what}; point it to a Method whose name is {name!r}")
            self._loaded[name] = found
        return self._loaded[name]

    def __setitem__(self, name: str, method: Method) -> None:
        self._loaded[name] = method

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._loaded or name in extensions.extension_names(extensions.METHODS)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._loaded, *extensions.extension_names(extensions.METHODS)]))

    def __len__(self) -> int:
        return sum(1 for _ in self)


METHODS = Registry()
