"""imrelay carries instant messages between plain browsers and RabbitMQ."""

__all__ = ["__version__"]

__version__ = "0.1.0"
