// Package client connects to the services of an Esper mesh. The messages and stubs are in gen/esper/<component>/v1.
package client

import (
	"encoding/json"
	"fmt"
	"os"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Mesh holds one connection for each service; it is safe for concurrent use.
type Mesh struct {
	addresses   map[string]string
	options     []grpc.DialOption
	mutex       sync.Mutex
	connections map[string]*grpc.ClientConn
}

// FromFile reads the addresses.json of a run folder. Without options the connections are in plain text, as on loopback.
func FromFile(path string, options ...grpc.DialOption) (*Mesh, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var addresses map[string]string
	if err := json.Unmarshal(text, &addresses); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(options) == 0 {
		options = []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	}
	return &Mesh{addresses: addresses, options: options, connections: map[string]*grpc.ClientConn{}}, nil
}

// Connection is the connection to a service by its name ("urza", "tolaria"...); it dials with the first call made on it.
func (m *Mesh) Connection(service string) (*grpc.ClientConn, error) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if connection, found := m.connections[service]; found {
		return connection, nil
	}
	address, found := m.addresses[service]
	if !found {
		return nil, fmt.Errorf("the mesh has no service %q", service)
	}
	connection, err := grpc.NewClient(address, m.options...)
	if err != nil {
		return nil, err
	}
	m.connections[service] = connection
	return connection, nil
}

// Close ends all connections; calls under way fail.
func (m *Mesh) Close() {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	for _, connection := range m.connections {
		_ = connection.Close() // fails only when it is closed already
	}
	clear(m.connections)
}
