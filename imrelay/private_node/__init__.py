"""The private RabbitMQ: what is installed, its data folder, its process, its supervision."""
