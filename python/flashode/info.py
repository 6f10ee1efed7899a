"""``python -m flashode.info``: what was compiled, and what can be used here."""

from .extension import build_config


def main():
    config = build_config()
    width = max(map(len, config))
    for key, value in config.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        print(f"{key:<{width}}  {text or '-'}")


if __name__ == "__main__":
    main()
