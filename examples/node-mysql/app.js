'use strict';

// One application, started twice: the two differ only in NAME and PORT.

const express = require('express');
const mysql = require('mysql2/promise');

const NAME = process.env.NAME || 'app1';
const PORT = Number(process.env.PORT || 3001);

const pool = mysql.createPool({
  host: process.env.DB_HOST || '127.0.0.1',
  port: Number(process.env.DB_PORT || 3306),
  user: process.env.DB_USER || 'sluice',
  password: process.env.DB_PASSWORD || 'sluice',
  database: process.env.DB_NAME || 'my_db',
  connectionLimit: 10,
});

const LONGEST = 255; // the columns' length
const isText = (value) =>
  typeof value === 'string' && value.trim() !== '' && value.length <= LONGEST;

const app = express();
app.disable('x-powered-by');
app.use(express.json());

app.get('/', (request, response) => {
  response.json({ app: NAME, port: PORT });
});

// Says that this application answers, and leaves the database out of it: both applications share
// the database, so its failure would take both out of service where they could still say why.
app.get('/health', (request, response) => {
  response.json({ app: NAME, status: 'ok' });
});

app.get('/users', async (request, response) => {
  const [users] = await pool.query('SELECT id, name, email FROM users ORDER BY id');
  response.json({ app: NAME, users });
});

app.post('/users', async (request, response) => {
  const { name, email } = request.body ?? {};
  if (!isText(name) || !isText(email)) {
    response.status(400).json({ app: NAME, error: `name and email are required, up to ${LONGEST} characters each` });
    return;
  }
  try {
    const [result] = await pool.execute(
      'INSERT INTO users (name, email) VALUES (?, ?)', [name, email]);
    response.status(201).json({ app: NAME, user: { id: result.insertId, name, email } });
  } catch (error) {
    if (error.code !== 'ER_DUP_ENTRY') throw error;
    response.status(409).json({ app: NAME, error: `email ${email} is taken` });
  }
});

// Whatever went wrong: JSON, too. Express and its body parser mark the client's mistakes with a
// status; anything else is ours.
app.use((error, request, response, next) => {
  if (response.headersSent) {
    next(error);
    return;
  }
  const status = error.status ?? 500;
  if (status >= 500) console.error(`${NAME}: ${request.method} ${request.path}:`, error.message);
  const text = status < 500 ? error.message : 'the database cannot be reached or refused';
  response.status(status).json({ app: NAME, error: text });
});

app.listen(PORT, (error) => {
  if (error) {
    console.error(`${NAME}: cannot listen on port ${PORT}: ${error.message}`);
    process.exit(1);
  }
  console.log(`${NAME}: listening on port ${PORT}`);
});
