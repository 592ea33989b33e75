"""The wing that speaks AMQP 0-9-1 to RabbitMQ; nothing outside of it imports pika."""
