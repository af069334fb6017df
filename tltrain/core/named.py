"""Values of a recipe that name what can be added: checked against the registry, and listed in the schema for editors."""

from __future__ import annotations

from pydantic import AfterValidator, ValidationInfo, WithJsonSchema

from tltrain.core import registry


def named(kind: str) -> tuple[AfterValidator, WithJsonSchema]:
    """Annotations of a string that must name something of a kind. The schema lists our names alone.

    Where the validation's context says kept, the recipe is of a run that was begun, and any name is taken.
    """

    def known(name: str, info: ValidationInfo) -> str:
        if not (info.context or {}).get("kept"):
            registry.check(kind, name, f"{name!r} is unknown")
        return name

    return AfterValidator(known), WithJsonSchema({"enum": list(registry.KINDS[kind]), "type": "string"})
