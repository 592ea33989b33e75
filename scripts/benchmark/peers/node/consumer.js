// What guaranteed.js declares for a user, and consumes for one socket of theirs.
'use strict';

const EXCHANGE = 'direct_message';
const PREFETCH = 100;
const INBOX = {
  durable: true,
  arguments: {
    'x-queue-type': 'classic',
    'x-single-active-consumer': true,
    'x-overflow': 'reject-publish',
    'x-dead-letter-exchange': 'imrelay.dead',
    'x-expires': 2592000000,
    'x-max-length': 100000,
  },
};

// Opens a user's inbox, or finds it open. The inbox is bound before its exchange is.
function declareUser(channel, id, done) {
  const exchange = `user.${id}`;
  const inbox = `inbox.${id}`;
  channel.assertExchange(exchange, 'topic', { durable: true, autoDelete: true });
  channel.assertQueue(inbox, INBOX);
  channel.bindQueue(inbox, exchange, '#');
  channel.bindExchange(exchange, EXCHANGE, id, {}, (error) => done(error));
}

// Mids that a socket has had from its live queue, since the inbox brings them again when it is promoted.
class Memory {
  constructor() {
    this.mids = new Set();
  }

  add(mid) {
    this.mids.add(mid);
    if (this.mids.size > 2000) this.mids.delete(this.mids.values().next().value);
  }

  has(mid) {
    return mid !== undefined && this.mids.has(mid);
  }
}

// What one socket consumes: the inbox and, where another socket is its active consumer, a live queue until it is not.
class Consumer {
  constructor(channel, user, write, fail) {
    this.channel = channel;
    this.user = user;
    this.inbox = `inbox.${user}`;
    this.write = write;
    this.fail = fail;
    this.isOver = false;
    // The last delivery that is written and not acknowledged.
    this.last = null;
    this.live = null;
    // While the live queue is emptied: what the inbox has brought, at most as much as the prefetch.
    this.held = null;
    this.seen = null;
  }

  attach(done) {
    declareUser(this.channel, this.user, (error) => {
      if (error) return done(error);
      this.channel.prefetch(PREFETCH);
      this.channel.consume(this.inbox, (delivery) => this.fromInbox(delivery), { noAck: false });
      return this.channel.checkQueue(this.inbox, (error, found) => {
        if (error || found.consumerCount < 2) return done(error);
        return this.openLive(done);
      });
    });
  }

  detach() {
    if (this.isOver) return;
    this.isOver = true;
    this.channel.close();
  }

  openLive(done) {
    this.seen = new Memory();
    this.channel.assertQueue('', { exclusive: true, autoDelete: true }, (error, queue) => {
      if (error) return done(error);
      this.live = queue.queue;
      this.channel.bindQueue(this.live, `user.${this.user}`, '#');
      return this.channel.consume(this.live, (delivery) => this.fromLive(delivery), { noAck: false }, done);
    });
  }

  take(delivery) {
    this.write(delivery.content, delivery.properties.type !== 'text', () => this.written(delivery));
  }

  // Acknowledges what was written in this turn of the event loop at once; writes end in the order of the deliveries.
  written(delivery) {
    if (this.isOver) return;
    // What is held has smaller tags than what is written before it.
    if (this.live) {
      this.channel.ack(delivery);
      return;
    }
    if (this.last === null) setImmediate(() => this.acknowledge());
    this.last = delivery;
  }

  acknowledge() {
    const { last } = this;
    this.last = null;
    if (!this.isOver) this.channel.ack(last, true);
  }

  fromInbox(delivery) {
    if (this.isOver) return undefined;
    if (!delivery) return this.fail(); // the inbox is gone
    if (!this.live) return this.isKnown(delivery) ? this.channel.ack(delivery) : this.take(delivery);
    if (this.held) return this.held.push(delivery);
    // This socket is promoted: what waits in its live queue is first, since the inbox may not have it any more.
    this.held = [delivery];
    return this.channel.unbindQueue(this.live, `user.${this.user}`, '#', {}, () => this.emptyLive());
  }

  fromLive(delivery) {
    if (!delivery || this.isOver) return;
    if (delivery.properties.messageId) this.seen.add(delivery.properties.messageId);
    this.take(delivery);
  }

  isKnown(delivery) {
    return this.seen !== null && this.seen.has(delivery.properties.messageId);
  }

  // Nothing is added to the live queue now. When it has nothing to deliver, all that it had has come.
  emptyLive() {
    if (this.isOver) return;
    this.channel.checkQueue(this.live, (error, found) => {
      if (error || this.isOver) return undefined;
      if (found.messageCount) return setTimeout(() => this.emptyLive(), 20);
      const { held } = this;
      this.channel.deleteQueue(this.live);
      this.live = null;
      this.held = null;
      for (const delivery of held) this.fromInbox(delivery);
      return undefined;
    });
  }
}

module.exports = { Consumer, EXCHANGE, declareUser };
