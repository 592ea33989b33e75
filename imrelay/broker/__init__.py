"""AMQP 0-9-1 to RabbitMQ: connections, channels, the publisher, and the consumers of sessions."""
