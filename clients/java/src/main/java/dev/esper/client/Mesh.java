package dev.esper.client;

import com.google.gson.Gson;
import com.google.gson.reflect.TypeToken;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/**
 * Channels to the services of one mesh, in plain text as on loopback; each connects with its first call. The messages
 * and stubs are in {@code dev.esper.<component>.v1}; give every call a deadline.
 */
public final class Mesh implements AutoCloseable {
  private final Map<String, String> addresses;
  private final Map<String, ManagedChannel> channels = new HashMap<>();

  /** Takes {@code host:port} of each service by its name ("urza", "tolaria"...). */
  public Mesh(Map<String, String> addresses) {
    this.addresses = Map.copyOf(addresses);
  }

  /** Reads the addresses.json of a run folder. */
  public static Mesh fromFile(Path path) throws IOException {
    return new Mesh(new Gson().fromJson(Files.readString(path), new TypeToken<Map<String, String>>() {}.getType()));
  }

  /** The channel to a service. */
  public synchronized ManagedChannel channel(String service) {
    String address = addresses.get(service);
    if (address == null) {
      throw new IllegalArgumentException("the mesh has no service \"" + service + "\"");
    }
    return channels.computeIfAbsent(service, name -> ManagedChannelBuilder.forTarget(address).usePlaintext().build());
  }

  /** Ends all channels; calls under way fail. */
  @Override
  public synchronized void close() throws InterruptedException {
    for (ManagedChannel channel : channels.values()) {
      channel.shutdownNow();
    }
    for (ManagedChannel channel : channels.values()) {
      channel.awaitTermination(5, TimeUnit.SECONDS);
    }
    channels.clear();
  }
}
