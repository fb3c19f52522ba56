-- Run as the database's administrator: mariadb < schema.sql
CREATE DATABASE IF NOT EXISTS my_db CHARACTER SET utf8mb4;

CREATE TABLE IF NOT EXISTS my_db.users (
    id    INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    name  VARCHAR(255) NOT NULL,
    email VARCHAR(255) NOT NULL UNIQUE
);

-- The applications' account. Choose another password, and give it to them as DB_PASSWORD.
CREATE USER IF NOT EXISTS 'sluice'@'%' IDENTIFIED BY 'sluice';
GRANT SELECT, INSERT ON my_db.* TO 'sluice'@'%';
