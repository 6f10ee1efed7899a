"""``python -m flashode.info``: what was compiled, and what can be used here."""

from .errors import CompileError
from .extension import build_config
from .program import build


def main():
    config = build_config() | {"compiled fields": _programs()}
    width = max(map(len, config))
    for key, value in config.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        print(f"{key:<{width}}  {text or '-'}")


def _programs() -> str:
    """What `flashode.compile` will use."""
    try:
        return f"{' '.join(build.compiler())}, libraries in {build.cache_folder()}"
    except CompileError as error:
        return f"none: {error}"


if __name__ == "__main__":
    main()
