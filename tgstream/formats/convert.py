"""``convert``: functions of the user that replace values before they are encoded.

A name of a column outranks a type. A type includes its subclasses, and the nearest base
class wins. ``functools.singledispatch`` finds it, so abstract base classes such as
``numbers.Number`` work too. None is never passed to a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import singledispatch
from typing import Any

from webob.exc import HTTPException

from .values import PLAIN_TYPES

Function = Callable[[Any], Any]


class Converter:
    """The functions of one ``convert`` mapping.

    :param where: the name of the format or function, for error messages.
    :param convert: maps a type or the name of a column to a function of one value.
    :raises TypeError: when it is not a mapping, a key is neither a type nor a str, or a
        value cannot be called.
    :raises ValueError: when a key is the type of None.
    """

    def __init__(self, where: str, convert: Mapping[Any, Function]) -> None:
        if not isinstance(convert, Mapping):
            raise TypeError(
                f"{where}: convert must be a mapping such as {{Decimal: str}}, got "
                f"{convert!r:.80}"
            )
        for key, function in convert.items():
            _check_pair(where, key, function)
        self._by_name = {
            str(key): function
            for key, function in convert.items()
            if isinstance(key, str)
        }
        self._by_type = {
            key: function
            for key, function in convert.items()
            if not isinstance(key, str)
        }
        self._find = self._make_finder(_keep)

    def _make_finder(self, other: Function) -> Callable[[type], Function]:
        """Return a function that finds the function of a class.

        :param other: the function of the classes without a function.
        """
        dispatcher = singledispatch(other)
        functions: dict[type, Function] = dict.fromkeys(PLAIN_TYPES, _keep)
        functions |= {
            dict: self._convert_dict,
            list: self._convert_list,
            tuple: self._convert_tuple,
        }
        for cls, function in functions.items():
            # A list, for example, is searched unless its class has a function.
            if not issubclass(cls, tuple(self._by_type)):
                dispatcher.register(cls, function)
        for cls, function in self._by_type.items():
            dispatcher.register(cls, function)
        dispatcher.register(type(None), _keep)
        return dispatcher.dispatch

    def expand_with(self, expand: Function) -> Converter:
        """Return a converter that also searches other objects.

        :param expand: returns the list or dict that a format writes for an object, or
            another value that replaces it.
        """
        converter = copy(self)
        converter._find = converter._make_finder(
            lambda value: converter.convert_parts(expand(value))
        )
        return converter

    def find_function(self, name: Any) -> Function | None:
        """Return the function of a column by its name, None for no function."""
        return self._by_name.get(name)

    def converts(self, cls: type) -> bool:
        """Whether a function gets the values of a class, not only their parts."""
        return issubclass(cls, tuple(self._by_type))

    def find_functions(
        self, header: Sequence[str], fields: Sequence[str] = ()
    ) -> list[Function | None]:
        """Return the function of each column by its name, None for no function.

        :param header: the names of the columns in the file.
        :param fields: the names of the same columns in the items, if they differ.
        """
        found: list[Function | None] = [None] * max(len(header), len(fields))
        for name, function in self._by_name.items():
            names = header if name in header else fields
            for index, column in enumerate(names):
                if column == name:
                    found[index] = function
        return found

    def convert_column(
        self,
        values: Sequence[Any],
        function: Function | None,
        name_value: Callable[[int], str],
    ) -> Sequence[Any]:
        """Return the values of a column, converted.

        :param function: the function of the column's name, None to convert by type.
        :param name_value: returns the item and the column of a value from its index,
            which an error message needs.
        :raises ValueError: when a function fails.
        """
        if function is None:
            types = set(map(type, values)) - {type(None)}
            functions = set(map(self._find, types))
            if functions <= {_keep}:
                return values
            function = functions.pop() if len(functions) == 1 else self.convert_value
        converted: list[Any] = []
        append = converted.append
        try:
            for value in values:
                append(None if value is None else function(value))
        except HTTPException:  # abort() and redirect()
            raise
        except Exception as error:
            raise _name_error(error, name_value(len(converted))) from error
        return converted

    def convert_one(
        self, value: Any, function: Function | None, name: Callable[[], str]
    ) -> Any:
        """Return a value, converted by a function or by its type.

        :param function: the function of the column's name, None to convert by type.
        :param name: returns the item and the column, for an error.
        :raises ValueError: when a function fails.
        """
        try:
            return None if value is None else (function or self.convert_value)(value)
        except HTTPException:
            raise
        except Exception as error:
            raise _name_error(error, name()) from error

    def convert_value(self, value: Any) -> Any:
        """Return a value, converted by its type, or with its parts converted."""
        return self._find(type(value))(value)

    def convert_parts(self, value: Any) -> Any:
        """Return a list or dict with its values converted, not the list or dict."""
        if isinstance(value, dict):
            return self._convert_dict(value)
        return self._convert_list(value) if isinstance(value, list) else value

    def _convert_dict(self, value: Any) -> Any:
        return {key: self.convert_value(part) for key, part in value.items()}

    def _convert_list(self, value: Any) -> Any:
        return list(map(self.convert_value, value))

    def _convert_tuple(self, value: Any) -> Any:
        return tuple(map(self.convert_value, value))


def make_converter(
    where: str, convert: Mapping[Any, Function] | None
) -> Converter | None:
    """Return the converter of a mapping, None if there is nothing to convert."""
    return None if convert is None or convert == {} else Converter(where, convert)


def _check_pair(where: str, key: Any, function: Any) -> None:
    # type() and not isinstance(): in Python 3.10, list[int] is an instance of type.
    if not isinstance(key, str) and not issubclass(type(key), type):
        raise TypeError(
            f"{where}: the keys of convert must be types or column names, got {key!r}"
        )
    if key is type(None):
        raise ValueError(
            f"{where}: convert cannot have NoneType: None is not converted"
        )
    if not callable(function):
        raise TypeError(
            f"{where}: convert must map {key!r} to a function of one value, got "
            f"{function!r:.80}"
        )


def _name_error(error: Exception, name: str) -> ValueError:
    return ValueError(f"{name}: convert raised {type(error).__name__}: {error}")


def _keep(value: Any) -> Any:
    return value
