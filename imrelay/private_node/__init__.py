"""The private RabbitMQ: its installation, data folder, process and supervision."""
